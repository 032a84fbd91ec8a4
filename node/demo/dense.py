"""The dense model that the demo model is made of, as its GGUF file holds it.

Law: tensors are dequantised one at a time, when asked for.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch


class Dense:
    """The dense model in a GGUF file: metadata as Python values, tensors dequantised one at a time."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        class Reader(GGUFReader):  # type: ignore[misc]  # untyped
            """Reads 100,000 small strings: three times as fast from a plain array as from an np.memmap object."""

            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, np.asarray(value) if name == "data" else value)

        reader = Reader(path)
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}

    def weight(self, name: str) -> torch.Tensor:
        """float32, in the shape that PyTorch gives it: [out, in]."""
        from gguf.quants import dequantize

        data, kind = self._tensors[f"{name}.weight"]
        return torch.from_numpy(dequantize(data, kind))
