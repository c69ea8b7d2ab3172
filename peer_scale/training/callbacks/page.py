"""The page of a run, beside its metrics: written when it ends, and never a reason for it to fail."""

from __future__ import annotations

from pathlib import Path

from peer_scale.training.complaints import complain
from peer_scale.training.run_folders import METRICS, PAGE

_MOST_BYTES = 128 * 2**20  # of metrics, which take a few seconds to read


def write_page(log_dir: Path) -> Path | None:
    """Draw the run in `log_dir`; give the page, or None and a line of warning where that fails."""
    output = log_dir / PAGE
    try:
        if (log_dir / METRICS).stat().st_size > _MOST_BYTES:
            print(f"notice: the run is long; its page is made by: peer-scale report {log_dir}", flush=True)
            return None
        from peer_scale.reporting.build import write_report  # plotly is needed only now

        write_report([log_dir], output)
    except Exception as error:  # whatever it is, the run has ended well
        why = " ".join(f"{type(error).__name__}: {error}".split())
        complain(f"{output}: the page could not be written ({why})")
        return None
    return output
