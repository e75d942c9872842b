"""check_clean.py GLOB... -- COMMAND...: run a command;
fail, and name the files, when it changed any file the globs match."""
import subprocess, sys
from hashlib import sha256
from pathlib import Path

def state(globs):
    return {p: sha256(p.read_bytes()).digest() for g in globs for p in sorted(Path('.').glob(g)) if p.is_file()}

i = sys.argv.index('--')
globs, cmd = sys.argv[1:i], sys.argv[i+1:]
before = state(globs)
if rc := subprocess.run(cmd).returncode: sys.exit(f"{' '.join(cmd)} failed with exit status {rc}")
after = state(globs)
changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
if changed: sys.exit('\n  '.join([f"{' '.join(cmd)} changed these files; look at the change and commit it:", *changed]))
