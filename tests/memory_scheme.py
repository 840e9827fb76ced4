"""memory:// as a scheme of epath's: objects in this process, with no bucket and no network."""

from sra_jax.remote import paths

FILES = paths.file_system("memory")

paths.register(["memory"])
