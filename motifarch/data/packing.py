"""From a stream of tokenised documents to blocks of one length."""

from collections.abc import Iterable, Iterator

import numpy as np

from motifarch.data.packed import Block


class BlockPacker:
    """Cuts a stream of documents into blocks of ``seq_len`` targets, with one block in memory.

    Block i holds tokens i * seq_len to (i + 1) * seq_len of the stream, both included: it shares
    one with the next, and every token but a document's first is the target of its predecessor in
    exactly one block.
    """

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.documents = 0
        self.tokens = 0
        self.blocks = 0
        self._block = np.empty(seq_len + 1, dtype=np.int32)
        self._filled = 0
        self._lengths: list[int] = []

    @property
    def leftover(self) -> int:
        """Tokens at the stream's end that no block holds yet."""
        return self._filled - 1 if self.blocks else self._filled

    def add(self, tokens: np.ndarray) -> Iterator[Block]:
        """Append one document (integers [n]) and yield the blocks that it completes."""
        self.documents += 1
        self.tokens += len(tokens)
        taken = 0
        while taken < len(tokens):
            count = min(len(tokens) - taken, self.seq_len + 1 - self._filled)
            self._block[self._filled : self._filled + count] = tokens[taken : taken + count]
            if taken:  # the document crosses a border: it goes on from the shared token
                self._lengths[-1] += count
            else:
                self._lengths.append(count)
            taken += count
            self._filled += count
            if self._filled == self.seq_len + 1:
                yield Block(self._block.copy(), np.array(self._lengths, dtype=np.int32))
                self.blocks += 1
                self._block[0] = self._block[-1]
                self._filled, self._lengths = 1, [1]


def pack(documents: Iterable[np.ndarray], seq_len: int) -> Iterator[Block]:
    """Pack documents (integers [n] each) into blocks; the last, partial block is left out."""
    packer = BlockPacker(seq_len)
    for tokens in documents:
        yield from packer.add(tokens)
