"""Files of prompts, and the lines that come back."""

import json
from pathlib import Path
from typing import Any


def prompt_file(folder: Path, *lines: Any, name: str = "prompts.jsonl") -> Path:
    """Writes a line for each string as it is, and for all else as JSON."""
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def results(text: str) -> list[dict[str, Any]]:
    """The objects in lines of JSON."""
    return [json.loads(line) for line in text.splitlines()]
