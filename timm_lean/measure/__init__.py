"""What a network costs and how it behaves: parameters, MACs, latency, memory, depth, similarity, identity."""
from .conv_depth import conv_depth
from .counts import count_macs, count_params, macs_by_module
from .latency import inference, measure_latency, measure_steps, training_step
from .memory import peak_memory
from .report import ModelReport, model_reports
from .table import format_table, human_bytes, human_count, to_json

__all__ = [
    'ModelReport', 'conv_depth', 'count_macs', 'count_params', 'format_table', 'human_bytes', 'human_count',
    'inference', 'macs_by_module', 'measure_latency', 'measure_steps', 'model_reports', 'peak_memory', 'to_json',
    'training_step',
]
