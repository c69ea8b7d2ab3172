"""Log folders with made-up metrics, and what a page of them says when it is parsed: for the tests of reports."""

import base64
import html.parser
import json
import math
import random
from pathlib import Path

import numpy as np
import yaml

CONFIG = {
    "name": "peer-tiny",
    "objective": {"kind": "tqr", "num_levels": 3},
    "training": {"train_iters": 300, "lr": 0.001},
    "output": {"log_dir": "somewhere"},
    "seed": 1,
}


def records(steps, *, seed=1, level=5.0):
    """One record per step with noise: losses fall, shares of labels add up to 1."""
    noise = random.Random(seed)
    for step in steps:
        part = math.exp(-step / 100)
        unknown = round(0.2 + 0.6 * part, 6)
        yield {
            "step": step,
            "samples": 8 * step,
            "tokens": 500 * step,
            "loss": level + 5 * part + noise.gauss(0, 0.1),
            "mlm_loss": level + part + noise.gauss(0, 0.1),
            "mlm_accuracy": 0.3 * (1 - part),
            "rtd_auc": None if step % 7 == 0 else 0.7 - 0.2 * part,
            "lr": 1e-3 * (1 - step / 400),
            "grad_norm": 1 + part,
            "loss_scale": 1.0,
            "skipped_steps": step // 100,
            "step_time_s": 0.25,
            "tokens_per_second": 2000 + 10 * noise.random(),
            "train_flops": 1e9 * step,
            "mfu": None,
            "rank_label_fractions": {"-1": unknown, "1": 0.5 * (1 - unknown), "2": 0.5 * (1 - unknown)},
            **({"validation_loss": level + 5 * part} if step % 50 == 0 else {}),
        }


def log_folder(path: Path, lines, config=None, **files) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "run.yaml").write_text(yaml.safe_dump(CONFIG if config is None else config))
    for name, content in files.items():
        (path / name.replace("_", ".")).write_text(content)
    return path


class Parsed(html.parser.HTMLParser):
    """A page as a browser without scripts would have it: tables, text, addresses, and the data of its figures."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables, self.text, self.addresses, self.scripts, self.handlers = {}, [], [], [], []
        self.plots = 0
        self._open, self._script = [], []
        self.feed(page)
        self.close()
        self.data = json.loads(next(text for kind, text in self.scripts if kind == "application/json"), **STRICT)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.handlers += [name for name in attributes if name.startswith("on")]
        self.addresses += [attributes[name] for name in ("src", "href", "action") if name in attributes]
        self.plots += attributes.get("class") == "plot"
        if tag == "table":
            self.tables[attributes["data-name"]] = self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            assert tag == "td" or attributes["scope"] in ("col", "row")
            self._rows[-1].append("")
        elif tag == "script":
            self.scripts.append((attributes.get("type"), ""))
        if tag not in ("meta", "link", "br", "wbr", "input", "line"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self._open:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._open and self._open[-1] in ("th", "td"):
            self._rows[-1][-1] += data.strip()
        elif "style" not in self._open:
            self.text.append(data)

    def figure(self, title):
        return next(each for each in self.data["figures"] if each["title"] == title)

    def curve(self, title, role, axis="step"):
        """The x and y of a figure's only trace of a role."""
        (trace,) = (each for each in self.figure(title)["data"] if each["meta"]["role"] == role)
        table = {name: values_of(each) for name, each in self.data["tables"][trace["meta"]["table"]].items()}
        return table[axis][values_of(trace["meta"]["at"])], values_of(trace["y"])


def _refuse(constant):
    raise AssertionError(f"{constant} in the page's data")


STRICT = {"parse_constant": _refuse}


def values_of(encoded) -> np.ndarray:
    """An array as plotly encodes it."""
    if isinstance(encoded, list):
        return np.array([math.nan if value is None else value for value in encoded])
    return np.frombuffer(base64.b64decode(encoded["bdata"]), dtype=np.dtype(encoded["dtype"]).newbyteorder("<"))


def check_figures(page: Parsed) -> None:
    """No figure is empty, and every curve lies over an axis in the order of its steps."""
    assert page.plots == len(page.data["figures"]) > 0
    for figure in page.data["figures"]:
        drawn = [trace for trace in figure["data"] if np.isfinite(values_of(trace["y"])).any()]
        assert drawn, figure["title"]
        for trace in figure["data"]:
            if figure["kind"] != "curve":
                continue
            table = page.data["tables"][trace["meta"]["table"]]
            at = values_of(trace["meta"]["at"]).astype(np.int64)
            assert len(at) == len(values_of(trace["y"])) > 0
            for values in table.values():
                assert (np.diff(values_of(values)[at]) >= 0).all()
