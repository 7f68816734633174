"""One file is one library; the file name is its name everywhere. `registry.py` in runtime finds them."""
