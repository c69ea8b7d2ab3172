"""The README.md that goes with exported weights: what they are, how they were trained, how to use them."""

import json
from dataclasses import asdict
from typing import Any

from peer_scale.checkpoints.reader import Checkpoint
from peer_scale.flops import paper_train_flops
from peer_scale.objectives.exports import Export


def model_card(checkpoint: Checkpoint, export: Export) -> str:
    """Write Markdown with the front matter that model hubs read; the licence is the publisher's to choose."""
    sections = checkpoint.sections
    name, step = sections.provenance.model, sections.progress.step
    facts = {"Model": name, "Branch": export.branch, "Step": step, **_training(checkpoint)}
    if export.left_out:
        facts |= {"Not in this folder": ", ".join(export.left_out)}
    facts |= {"Tokenizer digest": checkpoint.tokenizer.digest, "Objective": _objective(checkpoint)}
    if sections.imported is not None:
        facts |= {f"Weights of the {branch}": source for branch, source in sections.imported.items()}
    result = "logits" if export.head else "last_hidden_state"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
tags:
- {export.class_name}
---

# {name}, step {step}

{export.usage} The weights are the fp32 masters of a checkpoint written by peer_scale.

```python
from transformers import {export.class_name}, AutoTokenizer

model = {export.class_name}.from_pretrained("THIS_FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
{result} = model(**tokenizer("The quick brown fox ate over the lazy dog.", return_tensors="pt")).{result}
```

| | |
|---|---|
{table}

## Licence

None is given here: choose one before publishing, with the terms of the training text in mind.
"""


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    sections = checkpoint.sections
    data, layout, progress = sections.data, sections.layout, sections.progress
    if data is None or layout is None:
        return {}
    flops = paper_train_flops(
        checkpoint.model, checkpoint.objective, seq_length=data.seq_length, samples=progress.samples
    )
    return {
        "Sequences seen": f"{progress.samples:,}",
        "Tokens seen": f"{progress.tokens:,}",
        "Training FLOPs (paper accounting)": f"{flops:.4g}",
        "Sequence length": data.seq_length,
        "Global batch size": data.global_batch_size,
        "Data": ", ".join(sections.provenance.data_path),
        "Data fingerprint": data.fingerprint,
        "Seed": data.seed,
        "Layout": f"ZeRO-{layout.zero_stage}, data parallel {layout.data_parallel}, {layout.precision}",
    }


def _objective(checkpoint: Checkpoint) -> str:
    settings = checkpoint.objective.section() | asdict(checkpoint.sections.masking)
    return f"{checkpoint.objective.describe()}, {json.dumps(settings)}"
