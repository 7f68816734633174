"""The core: types, command line, matrix, launching, measuring, checking, statistics, writing."""
