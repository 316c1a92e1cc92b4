"""A row function that hangs, dies or leaves a child behind; a module of its own, since worker processes import it."""
import os
import subprocess
import sys
import time


def slow(text):
    if text == "hang":
        time.sleep(60)
    if text == "exit":
        os._exit(3)
    if text == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        time.sleep(60)
    return len(text)
