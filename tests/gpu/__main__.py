"""What only a GPU can show, in one command: is it right, how fast is it, was the estimate true, does it learn.

    bash launch/test.sh --gpu [OUT] [--minutes 8] [--parts right fast learn]
    bash launch/test.sh --gpu --rehearse [OUT]         the same with nano sizes, on a machine without a GPU

Each part is a program of its own, which adds rows to OUT/rows.jsonl while it runs. After each part OUT/gpu.json and
OUT/gpu.md are written anew, so whatever cuts this command off loses the unfinished part's last row at most. The exit
code is 0 where every check held. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = {"right": 0.3, "fast": 0.55, "learn": 1.0}  # by which share of the time each must be done
WORDS, REHEARSED_WORDS = 120_000, 400


def machine() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name() if cuda else "none",
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else 0,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def render(out: Path, words: int) -> subprocess.Popen[bytes]:
    """Starts rendering the words of `learn`, in a process group, on the cores that `right` leaves idle."""
    with (out / "words.log").open("wb") as log:
        return subprocess.Popen(
            ["nice", "-n", "15", sys.executable, str(HERE / "words.py"), str(out / "words"), str(words)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def tell(rendering: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if rendering.poll() is None:
        os.killpg(rendering.pid, number)


def read_rows(out: Path) -> list[dict[str, Any]]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each kind of row, with the columns that its rows have."""
    text = ""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [{name: value for name, value in row.items() if name != "kind"} for row in rows if row["kind"] == kind]
        names = list(dict.fromkeys(name for row in mine for name in row))
        text += f"\n### {kind}\n\n| {' | '.join(names)} |\n|{' --- |' * len(names)}\n"
        for row in mine:
            text += f"| {' | '.join(shown(row.get(name, '')) for name in names)} |\n"
    return text


def write(out: Path, facts: dict[str, Any], parts: dict[str, str]) -> None:
    rows = read_rows(out)
    (out / "gpu.json").write_text(json.dumps({"machine": facts, "parts": parts, "rows": rows}, indent=1))
    heading = ", ".join(f"{name} {shown(value)}" for name, value in facts.items())
    done = ", ".join(f"{name}: {outcome}" for name, outcome in parts.items())
    (out / "gpu.md").write_text(f"# On a GPU\n\n{heading}\n\n{done}\n{table(rows)}")


def run_part(name: str, out: Path, deadline: float, rehearse: bool) -> str:
    """Runs a part until its deadline (seconds since 1970); what became of it."""
    left = deadline - time.time()
    if left < 10:
        return "not begun: no time left"
    command = [sys.executable, str(HERE / f"{name}.py"), str(out), f"{deadline:.0f}", *["--rehearse"] * rehearse]
    began = time.time()
    with (out / f"{name}.log").open("wb") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=left + 15).returncode
        except subprocess.TimeoutExpired:
            return f"cut off after {time.time() - began:.0f} s"
    return f"{'held' if code == 0 else f'exit code {code}'} in {time.time() - began:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/test.sh --gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="nano sizes, for a machine without a GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="these only")
    options = parser.parse_args()
    facts, end = machine(), time.time() + 60 * options.minutes
    if not options.rehearse and facts["card"] == "none":
        print("error: torch sees no GPU here; --rehearse runs everything with nano sizes", file=sys.stderr)
        return 2
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").unlink(missing_ok=True)
    print(", ".join(f"{name} {shown(value)}" for name, value in facts.items()), flush=True)
    rendering, parts, began = render(out, REHEARSED_WORDS if options.rehearse else WORDS), {}, time.time()
    last = PARTS[options.parts[-1]]
    for name in options.parts:
        if name == "fast":  # what is timed has the machine for itself
            while not (out / "words" / "few").exists() and rendering.poll() is None:
                time.sleep(0.2)
            tell(rendering, signal.SIGSTOP)
        parts[name] = run_part(name, out, began + (end - began) * PARTS[name] / last, options.rehearse)
        tell(rendering, signal.SIGCONT)
        write(out, facts, parts)
        print(f"{name}: {parts[name]}", flush=True)
    tell(rendering, signal.SIGKILL)
    print((out / "gpu.md").read_text())
    for name, outcome in parts.items():
        if not outcome.startswith("held"):
            print(f"{name}: {outcome}; the end of {out / name}.log:", *log_end(out / f"{name}.log"), sep="\n    ")
    return 0 if all(outcome.startswith("held") for outcome in parts.values()) else 1


def log_end(path: Path, lines: int = 25) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
