"""CollectiveX: one timing boundary and one correctness oracle for every communication library.

In a checkout the code lies in the folders beside this one (`runtime/`, `backends/`, ...).
Adding the parent to `__path__` makes them importable as `collectivex.runtime` and so on,
so that `python -m collectivex` works from a bare checkout mounted into any vendor container.
In the wheel the same folders are already inside this package and nothing is added.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "runtime" / "types.py").is_file():
    __path__.append(str(_checkout))
