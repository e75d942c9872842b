"""Package metadata, read from settings.ini so that every fact stands in one place."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PAGES = ('experiments', 'comparison')

class WithPages(build_py):
    "The two pages travel in the package: `neuronprune page` needs them where there is no clone."
    def run(self):
        super().run()
        if self.editable_mode: return
        for o in PAGES:
            self.mkpath(str(Path(self.build_lib)/'neuronprune'/'pages'))
            self.copy_file(str(HERE/'nbs'/f'{o}.ipynb'), str(Path(self.build_lib)/'neuronprune'/'pages'/f'{o}.ipynb'))

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    package_data={'neuronprune': ['*.json', 'py.typed']}, cmdclass=dict(build_py=WithPages),
    packages=find_packages(include=['neuronprune', 'neuronprune.*']), python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(), extras_require=extras, zip_safe=False,
    classifiers=['Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    entry_points={'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"], 'console_scripts': ['neuronprune=neuronprune.cli:main']})
