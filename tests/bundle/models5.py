"""Under transformers 5: models of every family are saved, imported, compared and exported; prints what was found.

The arguments are a folder, which gets a folder for each model and `logits.safetensors`, and a tokenizer.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from megakexue.bundle.bundle import Bundle
from megakexue.bundle.generate import load_decoder
from megakexue.bundle.hf_check import load
from megakexue.bundle.hf_export import export_hf
from tests.helpers import ROOT, positions_of
from tests.hf import MODELS, MODELS_5, random_ids, save_model

place, tokenizer = map(Path, sys.argv[1:])
program, tokens = str(ROOT / "tools" / "import_hf.py"), random_ids(40)
found, logits = {}, {}
for name in MODELS | MODELS_5:
    theirs, bundle, hf = (place / name / kind for kind in ("theirs", "bundle", "hf"))
    model = save_model(name, theirs, tokenizer)
    sys.argv = [program, str(theirs), "--out", str(bundle)]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(program)["main"]()
    opened = Bundle(bundle)
    kind = export_hf(opened, hf, dtype="fp32")[0]
    with torch.no_grad():
        logits[name] = model(tokens).logits
        others = load_decoder(opened)(tokens, positions_of(tokens)), load(hf)(tokens).logits
    found[name] = {"class": kind, "difference": max((x - logits[name]).abs().max().item() for x in others)}
save_file(logits, place / "logits.safetensors")
print(json.dumps({"version": transformers.__version__, "models": found}))
