#!/usr/bin/env python
"""Turn text into the folder of token rows that training reads; megakexue/text/prepare.py says how."""

import argparse
import time
from pathlib import Path
from typing import Any

from megakexue.config import as_integer, as_number, run_program
from megakexue.text.ledger import report
from megakexue.text.prepare import PrepareArguments, prepare
from megakexue.text.progress import ProgressDisplay

EPILOG = """
INPUT is a file, a folder (all its files, but hidden ones; links are followed) or a quoted glob. Each is one document:
  a text file (Markdown, source code, anything in UTF-8), also .gz, .zst, .bz2 or .xz;
  a line of a .jsonl or .ndjson file, also packed: the string under --text-key;
  a row of a .parquet or .arrow file: the string in the column --text-key. A folder that the library `datasets` wrote
  by save_to_disk, or its cache, is read as it is;
  token ids in a .bin file, which stay as they are: by Megatron's .idx beside it, or what is between two --end-id
  (nanoGPT's and llm.c's). --tokenizer is then the one that made them. nanoGPT's have to be uint16, or uint32 where the
  tokenizer has more than 65,536 ids.
Documents with the same bytes are kept once. What cannot be used is counted, and listed in skipped.tsv. One bad record
costs that record. Of a packed file that is damaged, the lines before the damage are kept.

example, a tokenizer and data for a first run:
  tools/train_tokenizer.py notes/ 'wiki/*.jsonl.gz' --vocab-size 16384 --out data/tokenizer.model
  tools/prepare_data.py notes/ 'wiki/*.jsonl.gz' --tokenizer data/tokenizer.model --seq-len 1024 --out data/first
then in the YAML of the run:
  data: {tokenizer: data/first/tokenizer.model, seq_len: 1024, sources: [{path: data/first}]}

other examples:
  tools/prepare_data.py web.parquet --split-by language --tokenizer t.model --seq-len 1024 --out data/web
  tools/prepare_data.py owt/train.bin --end-id 50256 --tokenizer gpt2/tokenizer.json --seq-len 1024 --out data/owt

A tokenizer of others is its tokenizer.json, with tokenizer_config.json beside it, or its sentencepiece tokenizer.model.
Some of them change text (to NFC, for instance): the documents that do not come back byte for byte are kept, counted,
and listed in skipped.tsv too.

The rows do not depend on --processes. A run that is killed leaves nothing under --out: start it again.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="file, folder or quoted glob")
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        help="model file of tools/train_tokenizer.py, or tokenizer.json of another model",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")
    parser.add_argument(
        "--seq-len",
        required=True,
        type=as_integer,
        help="tokens of a row; a run may take a divisor of it",
    )
    parser.add_argument(
        "--packing",
        choices=("concat", "best_fit"),
        default="concat",
        help="concat: one stream, cut at row ends; best_fit: whole documents with padding (default: concat)",
    )
    parser.add_argument(
        "--valid-fraction", type=as_number, default=0.005, help="share of documents for validation (default: 0.005)"
    )
    parser.add_argument("--text-key", default="text", help="of .jsonl, .parquet and .arrow (default: text)")
    parser.add_argument(
        "--end-id",
        type=as_integer,
        metavar="ID",
        help="the id that stands between documents in a .bin of token ids, such as 50256 for GPT-2; without it a .bin "
        "is read only with Megatron's .idx beside it",
    )
    parser.add_argument(
        "--sample-alpha",
        type=as_number,
        help="subword sampling of the train split, drawn anew in each run, such as 0.2; unigram tokenizers only",
    )
    parser.add_argument(
        "--copies", type=as_integer, default=1, help="sampled copies of each training document (default: 1)"
    )
    parser.add_argument(
        "--split-by-length",
        type=as_integer,
        metavar="N",
        help="write two folders, OUT/long of the documents of more than N tokens and OUT/short of the others, so that "
        "data.sources can give each its weight",
    )
    parser.add_argument(
        "--split-by",
        metavar="KEY",
        help="write a folder OUT/VALUE for each string or whole number under this key of a line or column of a table, "
        "such as language or meta.source (source of the object meta); what has none goes to OUT/unlabelled",
    )
    parser.add_argument("--processes", type=as_integer, help="worker processes (default: one for each core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an --out that this program wrote before")
    return parser.parse_intermixed_args()


def summary(manifest: dict[str, Any], out: Path, seconds: float) -> str:
    """Return the lines that say what was written, dropped and skipped."""
    lines = []
    for name, split in manifest["splits"].items():
        entropy = split["unigram_entropy_nats"]
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens, "
            f"{split['rows']:,} rows of {manifest['seq_len']} + 1"
            + ("" if entropy is None else f", unigram entropy {entropy:.4f} nats")
        )
    lines += report(manifest)
    if manifest["round_trip"]["measured"]:
        lines += round_trip(manifest)
    if manifest["skipped"] or manifest["round_trip"]["changed"]:
        lines.append(f"all that was skipped or changed is listed in {out}/skipped.tsv")
    for name, split in manifest["splits"].items():
        if name.endswith("valid") and split["documents"] == 0 and manifest["valid_fraction"] > 0:
            lines.append(f"warning: no document fell into the {name} split; raise --valid-fraction")
        if name.endswith("train") and split["documents"] == 0:
            lines.append(f"warning: no document is in the {name} split: leave the folder out of data.sources")
    lines.append(f"padding {manifest['padding_share']:.2%}; written to {out} in {seconds:.0f} s")
    return "\n".join(lines)


def round_trip(manifest: dict[str, Any]) -> list[str]:
    """Return the lines that say how many documents a tokenizer of others changes."""
    documents = sum(split["documents"] for split in manifest["splits"].values())
    changed, paths = manifest["round_trip"]["changed"], manifest["round_trip"]["paths"]
    if not changed:
        return [f"round trip: all {documents:,} documents come back from their tokens byte for byte"]
    said = f"{changed:,} of {documents:,} documents ({changed / documents:.2%}) do not come back byte for byte"
    return [f"round trip: {said}, such as {paths[0]}", *(f"    {path}" for path in paths[1:])]


def main() -> None:
    options = parse_arguments()
    args = PrepareArguments(
        seq_len=options.seq_len,
        packing=options.packing,
        valid_fraction=options.valid_fraction,
        sample_alpha=options.sample_alpha,
        copies=options.copies,
        text_key=options.text_key,
        split_by_length=options.split_by_length,
        split_by=options.split_by,
        end_id=options.end_id,
    )
    with ProgressDisplay() as progress:
        manifest = prepare(
            options.inputs,
            options.tokenizer,
            options.out,
            args,
            processes=options.processes,
            overwrite=options.overwrite,
            on_progress=progress,
        )
    print(summary(manifest, options.out, time.perf_counter() - progress.start))


if __name__ == "__main__":
    run_program(main)
