"""What several test files share: no deadline for examples (the machine may be busy),
and pages that are run again and again in one kernel."""
import copy, os, signal
from pathlib import Path
import nbformat, pytest
from hypothesis import settings
from nbclient import NotebookClient

if 'PYTEST_XDIST_WORKER' in os.environ: signal.signal(signal.SIGINT, signal.default_int_handler) # it ignores Ctrl-C
settings.register_profile('patient', deadline=None); settings.load_profile('patient')

def run_pages(path, cases, extra=''):
    """Run All, once per case, in one kernel: each with its values after the parameters cell, then `extra`.
    The outputs of each run as text."""
    page, whole = nbformat.read(path, 4), None
    page.cells = [c for c in page.cells if 'injected-parameters' not in c.metadata.get('tags', [])] # an example's
    for i,case in enumerate(cases):
        nb = copy.deepcopy(page)
        for j,c in enumerate(nb.cells):
            c['id'] = f'r{i}c{j}'
            if 'parameters' in c.metadata.get('tags', []):
                c.source += ''.join(f'\n{k} = {v!r}' for k,v in case.items()) + f'\n{extra}'
        if whole is None: whole = nb
        else: whole.cells += nb.cells
    NotebookClient(whole, timeout=300, kernel_name='python3',
                   resources=dict(metadata=dict(path=str(Path(path).parent)))).execute()
    n = len(page.cells)
    return [str([c.get('outputs') for c in whole.cells[i*n:(i+1)*n]]) for i in range(len(cases))]

@pytest.fixture(scope='session')
def pages():
    "`run_pages`, with one thread."
    os.environ['OMP_NUM_THREADS'] = '1'
    return run_pages
