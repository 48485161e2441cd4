"""Tars read in sequence, from urls and pipes, through the webdataset library.

The documented exception to "a batch depends on seed and step alone": it depends on the ranks and workers too, which
each have their shards. A batch takes the next samples of its worker's shards. In place of those that
cannot be read it repeats others of its own, so that a resumed run can pass over what was seen without decoding it.
"""

from __future__ import annotations

import itertools
import os
import random
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from cibr.data.dataset import Dataset, SkipSample, group_id
from cibr.data.images import ENDINGS, decode
from cibr.data.listing import captions_and_class
from cibr.data.options import DataOptions
from cibr.data.order import random_numbers
from cibr.data.steps import Made
from cibr.data.tars import TEXTS, check_member, split_name
from cibr.data.transforms import Tokenizer, Transform, own_random_state
from cibr.errors import UsageError, missing_extra

SHUFFLED = 1000  # samples of a worker that are mixed
Bad = list[tuple[str, str]]  # name, reason


class Stream(Dataset):
    """Shards by url. It has neither length nor rows, so it can be trained on and nothing else."""

    def __init__(self, place: str, options: DataOptions) -> None:
        """Raises UsageError for options that need rows."""
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise missing_extra(error) from error
        if options.limit is not None:
            raise UsageError("--limit needs data that is not streamed")
        super().__init__((), ())
        self.urls, self.options = list(braceexpand(place)), options

    def __len__(self) -> int:
        raise UsageError(f"{self.options.data} is streamed, so its samples are not counted; this needs local files")

    def fingerprint(self) -> str:
        return "\n".join([f"{self.options.workers} workers", *self.urls])

    def samples(self, seed: int, reader: int, readers: int, bad: Bad) -> Iterator[dict[str, Any]]:
        """Without end, in each epoch this reader's share of the shards: bytes by ending, and `__key__`."""
        from webdataset import filters, tariterators

        def count(error: Exception) -> bool:
            bad.append((str(error)[:200], f"part of a stream that cannot be read ({type(error).__name__})"))
            return True

        for epoch in itertools.count():
            rng = random.Random(f"{seed} {epoch}")
            urls = rng.sample(self.urls, len(self.urls))[reader::readers]
            opened = tariterators.url_opener(({"url": url} for url in urls), handler=count)
            grouped = tariterators.group_by_keys(expand(opened, bad), keys=split_name, handler=count)
            yield from filters._shuffle(iter(grouped), SHUFFLED, SHUFFLED, rng=rng)


def expand(opened: Iterable[dict[str, Any]], bad: Bad) -> Iterator[dict[str, Any]]:
    """The members of opened tars, as webdataset has them, those after a damaged part included, which is counted."""
    for source in opened:
        url, end = source["url"], 0
        try:
            with tarfile.open(fileobj=source["stream"], mode="r|*", ignore_zeros=True) as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]
                    if member.offset > end:
                        bad.append((f"{url} at byte {end}", "damaged part of a tar"))
                    end = tar.offset
                    if not member.isdir():
                        yield from _member(tar, member, url, bad)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            bad.append((url, f"stream that ends early ({type(error).__name__})"))
        yield {}  # webdataset's mark: samples of two shards are not mixed


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, url: str, bad: Bad) -> Iterator[dict[str, Any]]:
    try:
        check_member(member)
    except SkipSample as reason:
        bad.append((f"{member.name} in {url}", str(reason)))
        return
    content = tar.extractfile(member)
    assert content is not None
    yield {"fname": member.name, "data": content.read(), "__url__": url}


class StreamSteps(IterableDataset[Made]):
    """This rank's parts of the batches of `step`, `step` + 1, ..., without end."""

    def __init__(
        self,
        stream: Stream,
        step: int,
        size: int,
        seed: int,
        transform: Transform | None,
        tokenizer: Tokenizer | None,
        workers: int,
    ) -> None:
        """`size` is the part's. Raises UsageError where there are fewer shards than ranks times workers."""
        self.stream, self.step, self.size, self.seed = stream, step, size, seed
        self.transform, self.tokenizer = transform, tokenizer
        self.rank, self.world = (int(os.environ.get(name, default)) for name, default in _RANKS)
        readers, shards = max(1, workers) * self.world, len(stream.urls)
        if readers > shards:
            raise UsageError(
                f"{stream.options.data} has {shards} shards, but {self.world} ranks times {max(1, workers)} --workers "
                f"read {readers} at a time"
            )

    def __iter__(self) -> Iterator[Made]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        step = self.step + worker  # the loader takes turns: of `workers` steps in a row each worker makes one
        bad: Bad = []
        reader = self.rank * workers + step % workers
        samples = self.stream.samples(self.seed, reader, workers * self.world, bad)
        for _ in range(step // workers * self.size):
            next(samples)
        for now in itertools.count(step, workers):
            made = self._make(now, list(itertools.islice(samples, self.size)), bad)
            made.bad, bad[:] = [*made.bad, *bad], []
            yield made

    def _make(self, step: int, samples: list[dict[str, Any]], bad: Bad) -> Made:
        images: list[Any] = []
        captions: list[str] = []
        groups: list[int] = []
        numbers = random_numbers(self.seed, step, torch.arange(self.size).numpy() + self.rank * self.size).tolist()
        with own_random_state() as seed:
            for sample, number in zip(samples, numbers, strict=True):
                try:
                    image, caption, group = self._read(sample, number)
                except SkipSample as reason:
                    bad.append((f"{sample['__key__']} in {sample['__url__']}", str(reason)))
                    continue
                seed(number)
                images.append(self.transform(image) if self.transform is not None else image)
                captions.append(caption)
                groups.append(group)
        if not images:
            return Made({}, [], f"none of the {self.size} samples of a batch can be read; {bad[-1][0]}: {bad[-1][1]}")
        places = [k % len(images) for k in range(self.size)]
        batch = {"image": torch.stack([images[k] for k in places])}
        batch["group_ids"] = torch.tensor([groups[k] for k in places], dtype=torch.int64)
        batch["index"] = torch.tensor(numbers, dtype=torch.int64)
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer([captions[k] for k in places])
        return Made(batch, [])

    def _read(self, sample: dict[str, Any], number: int) -> tuple[Image.Image, str, int]:
        """The image, one of its captions and its group. Raises SkipSample."""
        ending = next((ending for ending in ENDINGS if ending in sample), None)
        if ending is None:
            raise SkipSample("no image")
        options = self.stream.options
        texts = {ending: sample[ending] for ending in TEXTS if ending in sample}
        captions, named = captions_and_class(texts, options.caption_column)
        if not captions:
            raise SkipSample("no caption")
        caption = captions[number % len(captions)]
        return decode(sample[ending], options.max_pixels), caption, group_id(caption if named is None else str(named))


_RANKS = (("RANK", "0"), ("WORLD_SIZE", "1"))
