"""CIFAR-10's binary version: records of a label and three planes of 32x32."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

RECORD = 1 + 3 * 32 * 32  # bytes


def read(files: Sequence[Path]) -> dict[str, np.ndarray]:
    folder = "cifar-10-batches-bin"
    with tarfile.open(files[0]) as tar:
        batches = [f"{folder}/data_batch_{i}.bin" for i in range(1, 6)]
        train = np.concatenate([_records(tar, name) for name in batches])
        test = _records(tar, f"{folder}/test_batch.bin")
    return {
        f"{split}_{kind}": value
        for split, records in (("train", train), ("reference", test))
        for kind, value in (
            ("images", np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)),
            ("labels", np.ascontiguousarray(records[:, 0])),
        )
    }


def _records(tar: tarfile.TarFile, name: str) -> np.ndarray:
    content = tar.extractfile(name).read()
    return np.frombuffer(content, np.uint8).reshape(-1, RECORD)
