"""An experiment.json with made-up numbers: for tests alone, no result of anything."""

import json
import math
import random
from pathlib import Path

ARMS = {"bert": "BERT", "electra": "ELECTRA", "peer": "PEER, K = 3", "tfidf": "TF-IDF"}
TASKS = ("acceptability", "film reviews", "topics")
SEEDS = (1, 2, 3, 4, 5)


def write_experiment(folder: Path) -> dict:
    """Write the file; gives its content."""
    noise = random.Random(0)
    measures = [
        {"name": f"{group}/{task}", "label": task, "metric": "accuracy", "higher_is_better": True, "group": group}
        for group in ("probe", "finetune-1000", "finetune-all")
        for task in (*TASKS, "average")
    ]
    loss = {"name": "held-out/loss", "label": "loss", "metric": "loss", "higher_is_better": False, "group": "held-out"}
    measures.append(loss)

    def score(measure, place):
        if measure is loss:
            return None if place == 3 else 5.5 - 0.1 * place + noise.gauss(0, 0.05)
        return 0.55 + 0.05 * place + 0.1 * (measure["group"] == "finetune-all") + noise.gauss(0, 0.02)

    scores = {
        measure["name"]: {arm: [score(measure, place) for _ in SEEDS] for place, arm in enumerate(ARMS)}
        for measure in measures
    }
    scores["probe/topics"]["peer"][3] = None
    content = {
        "name": "made-up",
        "title": "Made up for tests: four arms",
        "sentence": "Made-up numbers, which say nothing of any model.",
        "budget": {"flops": 3e14, "accounting": "paper"},
        "arms": [
            {
                "name": arm,
                "label": label,
                "kind": "tfidf" if arm == "tfidf" else "trained",
                "changes": {} if arm == "tfidf" else {"model": arm, "objective.num_levels": place},
                "seeds": list(SEEDS),
                "runs": [_run(noise, arm, place, seed) for seed in SEEDS if (arm, seed) != ("peer", 5)],
            }
            for place, (arm, label) in enumerate(ARMS.items())
        ],
        "measures": measures,
        "scores": scores,
        "tests": [
            _test(scores, measure["name"], a, b)
            for measure in measures
            for a, b in (("peer", "bert"), ("peer", "electra"))
        ],
        "alpha": 0.05,
        "paper": {
            "table": "Table 3",
            "rows": {"peer": {"finetune-all/average": 0.8, "finetune-all/average/std": 0.01}},
        },
        "missing": ["peer-s5"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps(content))
    return content


def _run(noise, arm, place, seed):
    trained = arm != "tfidf"
    steps = range(10, 2001, 10) if trained else ()
    return {
        **{"seed": seed, "log_dir": None, "steps": 2000 if trained else 0, "tokens": 1_000_000 if trained else 0},
        **{"flops_paper": 3e14 if trained else 0.0, "flops_actual": 3e14 * (1 + place / 10) if trained else 0.0},
        **{"wall_s": 1000.0 + 50 * place + 10 * noise.random() if trained else 0.0, "held_out": {}},
        "curve": [
            {
                **{"step": step, "tokens": 500 * step, "train_flops": 1.5e11 * step, "time_s": 0.5 * step},
                "loss": 5 + math.exp(-step / 300) + noise.gauss(0, 0.02),
                "mlm_accuracy": 0.3 * (1 - math.exp(-step / 400)) + noise.gauss(0, 0.01),
            }
            for step in steps
        ],
        "checkpoints": [
            {
                "step": 500 * part,
                "train_flops": 7.5e13 * part,
                "scores": {f"finetune-all/{task}": 0.5 + 0.05 * part for task in (*TASKS, "average")},
            }
            for part in ((1, 2, 3, 4) if trained else ())
        ],
    }


def _test(scores, measure, a, b):
    means = [[value for value in scores[measure][arm] if value is not None] for arm in (a, b)]
    difference = sum(means[0]) / len(means[0]) - sum(means[1]) / len(means[1])
    told = {"t": 3.0, "df": 7.5, "p": 0.02, "p_holm": 0.04 if b == "bert" else 0.4, "significant": b == "bert"}
    return {"measure": measure, "family": "arms", "a": a, "b": b, "difference": difference, **told}
