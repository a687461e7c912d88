"""Imported before all else by each program: Ctrl-C during the imports, which take seconds, ends it
quietly."""
import signal
import sys
from pathlib import Path

program = getattr(sys.modules["__main__"], "__file__", None) or "/"
is_ours = Path(program).resolve().is_relative_to(Path(__file__).resolve().parent.parent)
if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program hears signals itself
