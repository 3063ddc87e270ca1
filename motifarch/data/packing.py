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
        self.padding_tokens = 0
        self._block = np.empty(seq_len + 1, dtype=np.int32)
        self._filled = 0
        self._lengths: list[int] = []

    @property
    def leftover(self) -> int:
        """Tokens at the stream's end that no block holds yet."""
        return self._filled - 1 if self.blocks else self._filled

    def finish(self) -> Iterator[Block]:
        """No block: the last, partial one is left out."""
        return iter(())

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


class DocumentPacker:
    """Lays whole documents into blocks, the fullest that has room, and fills blocks up at the end.

    The padding is a document of its own, so that nothing attends to it. Some blocks are open at a
    time; where a document fits none, the fullest is closed.
    """

    OPEN = 64

    def __init__(self, seq_len: int, padding: int) -> None:
        self.seq_len = seq_len
        self.padding = padding
        self.documents = 0
        self.tokens = 0
        self.blocks = 0
        self.leftover = 0
        self.padding_tokens = 0
        self._open: list[list[np.ndarray]] = []
        self._rooms: list[int] = []

    def add(self, tokens: np.ndarray) -> Iterator[Block]:
        """Lay one document (integers [n], n at most seq_len + 1), and yield the block that is full
        by it or is closed for it.
        """
        self.documents += 1
        self.tokens += len(tokens)
        place = min((i for i, room in enumerate(self._rooms) if room >= len(tokens)), key=self._room, default=None)
        if place is None:
            if len(self._open) == self.OPEN:
                yield self._close(min(range(self.OPEN), key=self._room))
            self._open.append([])
            self._rooms.append(self.seq_len + 1)
            place = len(self._open) - 1
        self._open[place].append(tokens)
        self._rooms[place] -= len(tokens)
        if not self._rooms[place]:
            yield self._close(place)

    def finish(self) -> Iterator[Block]:
        """The blocks that are still open."""
        while self._open:
            yield self._close(0)

    def _room(self, place: int) -> int:
        return self._rooms[place]

    def _close(self, place: int) -> Block:
        documents, room = self._open.pop(place), self._rooms.pop(place)
        if room:
            documents.append(np.full(room, self.padding))
        self.blocks += 1
        self.padding_tokens += room
        lengths = np.array([len(tokens) for tokens in documents], dtype=np.int32)
        return Block(np.concatenate(documents).astype(np.int32), lengths)


def pack(documents: Iterable[np.ndarray], seq_len: int) -> Iterator[Block]:
    """Pack documents (integers [n] each) into blocks; the last, partial block is left out."""
    packer = BlockPacker(seq_len)
    for tokens in documents:
        yield from packer.add(tokens)
