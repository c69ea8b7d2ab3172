"""The README.md that goes with exported weights: what they are, how they were trained, how to use them."""

import dataclasses
import json
from typing import Any

from peer_scale.checkpoints.reader import Checkpoint
from peer_scale.flops import paper_train_flops

_USE = {
    "ElectraForPreTraining": "Positive logits mark tokens that do not fit: logit = -(w.h) + xi_{K-1}.",
    "ElectraForMaskedLM": "This is the generator of the pre-training pair, kept to inspect it or to train further.",
    "BertForMaskedLM": "A masked language model.",
}


def model_card(checkpoint: Checkpoint, architecture: str) -> str:
    """Returns Markdown with the front matter that model hubs read; the licence is the publisher's to choose."""
    facts = {"Model": checkpoint.provenance.model, "Step": checkpoint.progress.step, **_training(checkpoint)}
    facts |= {"Tokenizer digest": checkpoint.tokenizer.digest, "Objective": _objective(checkpoint)}
    if checkpoint.imported is not None:
        facts |= {f"Weights of the {network}": source for network, source in checkpoint.imported.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
tags:
- {architecture}
---

# {checkpoint.provenance.model}, step {checkpoint.progress.step}

{_USE[architecture]} The weights are the fp32 masters of a checkpoint written by peer_scale.

```python
from transformers import {architecture}, AutoTokenizer

model = {architecture}.from_pretrained("THIS_FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
logits = model(**tokenizer("The quick brown fox ate over the lazy dog.", return_tensors="pt")).logits
```

| | |
|---|---|
{table}

## Licence

None is given here: choose one before publishing, with the terms of the training text in mind.
"""


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    data, layout, progress = checkpoint.data, checkpoint.layout, checkpoint.progress
    if data is None or layout is None:
        return {}
    flops = paper_train_flops(checkpoint.model, seq_length=data.seq_length, samples=progress.samples)
    return {
        "Sequences seen": f"{progress.samples:,}",
        "Tokens seen": f"{progress.tokens:,}",
        "Training FLOPs (paper accounting)": f"{flops:.4g}",
        "Sequence length": data.seq_length,
        "Global batch size": data.global_batch_size,
        "Data": ", ".join(checkpoint.provenance.data_path),
        "Data fingerprint": data.fingerprint,
        "Seed": data.seed,
        "Layout": f"ZeRO-{layout.zero_stage}, data parallel {layout.data_parallel}, {layout.precision}",
    }


def _objective(checkpoint: Checkpoint) -> str:
    if checkpoint.model.ranker is None:
        names = ("mask_fraction", "mask_probability")
        return "masked language modelling, " + json.dumps({name: getattr(checkpoint.objective, name) for name in names})
    kind = (
        "ELECTRA (replaced-token detection)" if checkpoint.objective.num_levels == 2 else "PEER (token quality ranking)"
    )
    return f"{kind}, {json.dumps(dataclasses.asdict(checkpoint.objective))}"
