"""PyTorch's files, and the signatures that they carry: nothing is loaded, no pickle is opened.

- TorchScript: a zip with ``<root>/constants.pkl`` and ``<root>/code/…``; its code names the inputs and how many tensors
  come out, but tells neither types nor shapes.
- torch.export: a zip with a graph as JSON, which has names, types and sizes.
- anything else (weights, whole pickled modules) is for a scoring file to load.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from typing import Any

from ..core.signatures import Signature, Slot
from ..core.torch_files import exported, scripted
from .zips import entry

DATATYPES = {1: "UINT8", 2: "INT8", 3: "INT16", 4: "INT32", 5: "INT64", 6: "FP16", 7: "FP32", 8: "FP64", 12: "BOOL",
             13: "BF16"}
"""torch.export's ScalarType → the datatype of the Open Inference Protocol."""
CLASS = re.compile(rb"^\x80\x02c(__torch__[\w.]*)\n(\w+)\n")
"""How a module's ``data.pkl`` begins: the global that names its class."""


def scan(archive: zipfile.ZipFile) -> Signature | None:
    """None: it carries none. Raises BadZip, and what a hostile JSON makes the parser raise (ValueError, LookupError,
    TypeError, AttributeError, RecursionError)."""
    names = archive.namelist()
    if graph := exported(names):
        return _exported(json.loads(entry(archive, graph)))
    root = scripted(names)
    return _scripted(archive, root) if root else None


# -- torch.export -----------------------------------------------------------------------------------------------------


def _exported(program: Any) -> Signature:
    module = program["graph_module"]
    values, said = module["graph"]["tensor_values"], module["signature"]
    whole = next((e["signature"] for e in module.get("module_call_graph") or () if e.get("fqn") == ""), None) or {}
    inputs = [_tensor(spec["user_input"]["arg"], values) for spec in said["input_specs"] if "user_input" in spec]
    outputs = [_tensor(spec["user_output"]["arg"], values) for spec in said["output_specs"] if "user_output" in spec]
    told = whole.get("forward_arg_names") or []
    if len(told) == len(inputs):
        inputs = [{**slot, "name": str(name)} for slot, name in zip(inputs, told, strict=True)]
    keys = _keys(whole.get("out_spec")) or [f"output-{n}" for n in range(len(outputs))]
    outputs = [{**slot, "name": key} for slot, key in zip(outputs, keys, strict=False)]
    return {"inputs": inputs, "outputs": outputs}


def _tensor(argument: Mapping[str, Any], values: Mapping[str, Any]) -> Slot:
    name = str(argument["as_tensor"]["name"])
    meta = values[name]
    sizes = [size.get("as_int", -1) for size in meta["sizes"]]
    out: Slot = {"name": name, "shape": [n if type(n) is int and n >= 0 else -1 for n in sizes]}
    return {**out, "datatype": DATATYPES[meta["dtype"]]} if meta["dtype"] in DATATYPES else out


def _keys(spec: Any) -> list[str]:
    """The keys of a program that returns a flat dict: of its pytree spec."""
    tree = json.loads(spec)[1] if spec else {}
    if tree.get("type") != "builtins.dict" or any(child["children_spec"] for child in tree["children_spec"]):
        return []
    return [str(key) for key in json.loads(tree["context"])]


# -- TorchScript ------------------------------------------------------------------------------------------------------


def _scripted(archive: zipfile.ZipFile, root: str) -> Signature | None:
    found = CLASS.match(entry(archive, f"{root}/data.pkl", 4096))
    if found is None:
        return None
    module, name = found[1].decode(), found[2].decode()
    source = entry(archive, f"{root}/code/{module.replace('.', '/')}.py").decode("utf-8", "replace")
    _, _, body = source.partition(f"class {name}(Module):\n")
    body = re.split(r"^class ", body, maxsplit=1, flags=re.MULTILINE)[0]
    told = re.search(r"^  def forward\(self: [\w.]+,?\s*(.*?)\) -> ([^:]+):", body, re.MULTILINE | re.DOTALL)
    if told is None:
        return None
    inputs = re.findall(r"(\w+): Tensor(?=,|\s*$)", told[1])
    count = len(re.findall(r"\bTensor\b", told[2])) if re.fullmatch(r"Tensor|Tuple\[[Tensor, ]+\]", told[2]) else 0
    return {"inputs": [{"name": n} for n in inputs], "outputs": [{"name": f"output-{n}"} for n in range(count)]}
