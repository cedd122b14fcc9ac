"""The tests; `check` is what pytest checks the package's annotations with: an int may stand for a float (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
