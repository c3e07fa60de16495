"""Everything is in pyproject.toml, but for one step: the wheel carries the YAML of recipes/ and evals/.

Both are top-level folders of data, not packages. In a wheel they lie inside the package, as
`patchattn/recipes/` and `patchattn/evals/`; an editable install reads them where they are, beside it.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DATA_FOLDERS = ("recipes", "evals")


class BuildWithData(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for source, target in self.data_copies().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def data_copies(self):
        """Maps each YAML file to its place in the build folder."""
        files = (path for folder in DATA_FOLDERS for path in sorted(Path(folder).rglob("*.y*ml")))
        return {str(path): str(Path(self.build_lib, "patchattn", path)) for path in files}

    def get_source_files(self):
        return [*super().get_source_files(), *self.data_copies()]

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *self.data_copies().values()]


setup(cmdclass={"build_py": BuildWithData})
