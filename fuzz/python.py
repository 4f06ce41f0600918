"""One target of `fuzz.codecs` under atheris: `python -m fuzz.python TARGET SECONDS`, from the root of the tree.

What is instrumented must be imported while atheris looks, so nothing else imports it here before.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main(name: str, seconds: int) -> None:
    """Corpus and findings are in `target/`, as those of the Rust targets; ends the process."""
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=["virtio_test"]):
        codecs: Any = import_module("fuzz.codecs")
    # What a peer broke is said in a line each, a million times.
    logging.disable(logging.WARNING)
    corpus, findings = Path("target", "corpus", name), Path("target", "findings", name)
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    if name == "case":
        for file in Path("tests", "corpus").glob("*.json"):
            if json.loads(text := file.read_bytes()).get("virtio-test") == "ring-case":
                (corpus / file.stem).write_bytes(text)
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-print_final_stats=1", "-rss_limit_mb=4096"]
    atheris.Setup(["python", *options, f"-artifact_prefix={findings}/", str(corpus)], codecs.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
