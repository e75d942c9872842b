"""The notebooks that reproduce the papers, and the tutorials, run from end to end in their quick form."""
from pathlib import Path
import resource
import papermill as pm, pytest

NBS = Path(__file__).resolve().parent.parent/'nbs'
BOOKS = sorted((NBS/'papers').glob('*.ipynb')) + sorted((NBS/'tutorials').glob('*.ipynb'))
NEEDS = dict(pitch='torchcrepe', timm='timm') # packages that a tutorial needs and the development environment has not

# few blocks and caps, in the quick form, put some budgets out of reach
ALLOWED = 'Kernel is running', 'UserWarning: allocate: sparsity'

def spent():
    "CPU seconds of the kernels that have ended: on a busy machine they do not grow as the clock does."
    r = resource.getrusage(resource.RUSAGE_CHILDREN)
    return r.ru_utime + r.ru_stime

@pytest.mark.parametrize('book', BOOKS, ids=lambda p: p.stem)
def test_quick_form(book, tmp_path, monkeypatch):
    if book.stem in NEEDS: pytest.importorskip(NEEDS[book.stem])
    monkeypatch.delenv('NEURONPRUNE_DATA', raising=False); before = spent()
    nb = pm.execute_notebook(str(book), str(tmp_path/'page.ipynb'), dict(smoke=True, out=str(tmp_path/'runs')),
                             kernel_name='python3', progress_bar=False, cwd=str(tmp_path))
    assert spent()-before < 60
    assert not [o for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'error'
                or o.get('name') == 'stderr' and not any(k in o.text for k in ALLOWED)]
