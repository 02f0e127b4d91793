"""What a network is on disk: its recipe, its tensors, one safetensors file."""
from .files import atomic_dir, atomic_file, lock_dir, output_file, writable_dir
from .format import load_any, load_model, read_header, read_recipe, save_hf_dir, save_model, set_head
from .recipe import Recipe, apply_steps, build, has_step, list_steps, recipe_of, record_step, register_step

__all__ = [
    'Recipe', 'apply_steps', 'atomic_dir', 'atomic_file', 'build', 'has_step', 'list_steps', 'load_any',
    'load_model', 'lock_dir', 'output_file', 'read_header', 'read_recipe', 'recipe_of', 'record_step',
    'register_step', 'save_hf_dir', 'save_model', 'set_head', 'writable_dir',
]
