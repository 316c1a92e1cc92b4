"""The data layer: groups of responses, their labels, and batches of columns. See docs/design.md."""
from importlib import import_module

_HOME = {"Batch": "batch", "Group": "records", "Response": "records", "COLUMNS": "columns", "document": "columns",
         "load": "formats", "dump": "formats", "to_trl": "formats", "checked": "validate", "Prepared": "prepare",
         "Encoding": "encoding", "encode": "encoding"}
__all__ = sorted(_HOME)


def __getattr__(name):                                        # torch is imported on first use of a tensor type only
    if name not in _HOME:
        raise AttributeError(f"module 'data_tools' has no attribute {name!r}; known: {', '.join(__all__)}")
    return getattr(import_module(f"data_tools.{_HOME[name]}"), name)
