"""Reads a GGUF file with the public package and writes every tensor's values as float32, one after another.

  python dequantize.py FILE.gguf VALUES.bin      prints JSON: metadata, and name, type and shape of each tensor in order
"""
import json
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

reader = GGUFReader(sys.argv[1])
tensors = []
with open(sys.argv[2], "wb") as out:
    for t in reader.tensors:
        values = dequantize(t.data, t.tensor_type).astype(np.float32)
        assert values.size == t.n_elements, (t.name, values.shape, t.n_elements)
        out.write(values.tobytes())
        tensors.append({"name": t.name, "type": t.tensor_type.name, "shape": [int(n) for n in t.shape]})
metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
json.dump({"metadata": metadata, "tensors": tensors}, sys.stdout)
