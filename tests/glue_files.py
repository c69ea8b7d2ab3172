"""A line or two of each of GLUE's tasks, in GLUE's own layout with its oddities."""

MNLI_HEAD = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    "sentence1\tsentence2"
)


def mnli(number: int, label: str, annotators: int = 0) -> str:
    texts = f'He said "yes {number}.\tHe said no.'
    return f"{number}\t1\t2\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\t{texts}\t" + "neutral\t" * annotators + label


STSB_HEAD = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
FILES = {
    "CoLA/train.tsv": 'gj04\t1\t\tThe "sailors rode the breeze.\ngj04\t0\t*\tThey drank the pub.\u2028\n',
    "CoLA/dev.tsv": "gj04\t1\t\tBill sang.\r\n",
    "CoLA/test.tsv": "index\tsentence\n0\tBill whistled.\n",
    "SST-2/train.tsv": "sentence\tlabel\nit 's \" charming \t1\n",
    "SST-2/dev.tsv": "sentence\tlabel\nno \t0\n",
    "SST-2/test.tsv": "index\tsentence\n0\tuneasy mishmash\n1\tfine\n",
    "MRPC/train.tsv": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t71\tHe "said so .\tSo he said .\n',
    "MRPC/dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t70\t71\tA\tB\n",
    "MRPC/test.tsv": "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tC\tD\n",
    "STS-B/train.tsv": f"{STSB_HEAD}\tscore\n0\tg\tf\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t4.500\n",
    "STS-B/dev.tsv": f"{STSB_HEAD}\tscore\n0\tg\tf\t2012\t1\tnone\tnone\tA.\tB.\t0\n",
    "STS-B/test.tsv": f"{STSB_HEAD}\n0\tg\tf\t2012\t1\tnone\tnone\tC.\tD.\n",
    "QQP/train.tsv": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        '1\t2\t3\tHow "so?\tWhy?\t1\n'
        "2\t3\t4\tcut short\n"
        "and the rest\t0\n"
        "3\t4\t5\tWho?\tWhom?\t0\n"
    ),
    "QQP/dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t0\n",
    "QQP/test.tsv": "id\tquestion1\tquestion2\n0\tA?\tB?\n",
    "MNLI/train.tsv": f"{MNLI_HEAD}\tlabel1\tgold_label\n{mnli(0, 'neutral', 1)}\n",
    "MNLI/dev_matched.tsv": (
        f"{MNLI_HEAD}\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n{mnli(0, 'entailment', 5)}\n"
    ),
    "MNLI/dev_mismatched.tsv": (
        f"{MNLI_HEAD}\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n{mnli(0, 'contradiction', 5)}\n"
    ),
    "MNLI/test_matched.tsv": f"{MNLI_HEAD}\n{mnli(0, '').rstrip()}\n",
    "MNLI/test_mismatched.tsv": f"{MNLI_HEAD}\n{mnli(0, '').rstrip()}\n",
    "diagnostic/diagnostic.tsv": "index\tsentence1\tsentence2\n0\tThe cat sat.\tThe cat did not sit.\n",
    "QNLI/train.tsv": 'index\tquestion\tsentence\tlabel\n0\tWhen?\tIn "2004.\tnot_entailment\n',
    "QNLI/dev.tsv": "index\tquestion\tsentence\tlabel\n0\tA?\tB.\tentailment\n",
    "QNLI/test.tsv": "index\tquestion\tsentence\n0\tA?\tB.\n",
    "RTE/train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tNo weapons.\tWeapons.\tnot_entailment\n",
    "RTE/dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
    "RTE/test.tsv": "index\tsentence1\tsentence2\n0\tA.\tB.\n",
}
