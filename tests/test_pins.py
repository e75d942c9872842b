"""The versions that pip is held to: those the release was tested with, and the oldest that settings.ini allows."""
import subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

def needs():
    c = ConfigParser(delimiters=['=']); c.read(ROOT/'settings.ini', encoding='utf-8')
    return {k: {r.name: r.specifier for r in map(Requirement, v.split())} for k, v in c['DEFAULT'].items()
            if k.endswith('requirements')}

def pins(text):
    return {r.name: next(iter(r.specifier)).version
            for r in map(Requirement, (o for o in text.splitlines() if not o.startswith('#')))}
def made(what):
    return subprocess.run([sys.executable, ROOT/'scripts/pins.py', what], check=True, capture_output=True,
                          text=True).stdout

def test_tested_versions_are_allowed_and_complete():
    tested = pins((ROOT/'constraints.txt').read_text(encoding='utf-8')); want = needs()
    assert not (set(want['requirements']) | set(want['dev_requirements'])) - set(tested)
    assert not {k: v for o in want.values() for k, spec in o.items() if (v := tested.get(k)) and v not in spec}
    assert not [o for o in tested.values() if '+' in o] # no build of torch's

def test_oldest_versions_are_the_lower_bounds():
    oldest = pins(made('oldest')); want = {k: v for o in needs().values() for k, v in o.items()}
    assert set(needs()['requirements']) <= set(oldest), 'a requirement without a lower bound'
    for k, v in oldest.items(): assert v in want[k] and f'>={v}' in str(want[k])
    assert oldest.keys() == {k for k, v in want.items() if '>=' in str(v)}

def test_installed_versions():
    installed = pins(made('tested'))
    assert set(needs()['requirements']) <= set(installed) and not {
        k: v for k, v in installed.items() if (s := needs()['requirements'].get(k)) is not None and v not in s}

def test_anything_else_is_help():
    r = subprocess.run([sys.executable, ROOT/'scripts/pins.py', 'newest'], capture_output=True, text=True)
    assert r.returncode == 1 and 'oldest|tested' in r.stderr

@pytest.mark.parametrize('pins_, want', [('', "-e '.[dev]'"), ('constraints.txt', "-e '.[dev]' -c constraints.txt")])
def test_make_takes_the_pins(pins_, want):
    out = subprocess.run(['make', '-n', '-B', 'install', f'PINS={pins_}'], cwd=ROOT, check=True, capture_output=True,
                         text=True).stdout
    assert want+'\n' in out.replace(' \n', '\n')
