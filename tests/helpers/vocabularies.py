"""Text that vocabularies are trained on, and their sizes."""

import itertools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SIZE, STAGE_1 = 1500, 1000
_WORDS = (
    "그 사람은",
    "학교에",
    "가지",
    "않았다.",
    "모델을",
    "학습하는",
    "방법은",
    "다음과",
    "같습니다.",
    "2026년에",
    "토큰",
)


def made_texts() -> Iterator[str]:
    """Real Python, and Korean sentences of a few words."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    yield from (path.read_text(encoding="utf-8") for path in itertools.islice(files, 12))
    draw = random.Random(0)
    for _ in range(300):
        yield "\n".join(" ".join(draw.choices(_WORDS, k=8)) for _ in range(5))
