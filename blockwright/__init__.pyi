# The public names, and where each is defined. blockwright/lazy.py reads this file, type checkers too.

__version__: str

# compose and load models
from interop.source import load as load
from blocks.compose import check as check
from blocks.compose import compose as compose
from blocks.compose import preset as preset
from blocks.decoder import Decoder as Decoder

# add blocks
from registry import BlockError as BlockError
from registry import Composable as Composable
from registry import ConfigError as ConfigError
from registry import RegistrationError as RegistrationError
from registry import SameAs as SameAs
from registry import family as family
from registry import kinds as kinds
from registry import names as names
from registry import register as register
from blocks.base import Block as Block
from blocks.base import Placement as Placement
from blocks.conformance import cases as conformance_cases

# add implementations of kernels, and make of linear layers
from blocks.kernels.choice import Kernels as Kernels
from blocks.kernels.scoring import Scoring as Scoring
from blocks.kernels.scoring import Slopes as Slopes
from blocks.kernels.seam import kernel as kernel
from blocks.linear import linears as linears
from blocks.conformance.kernel_parity import kernel_cases as kernel_cases

# the contract of each kind, and what passes between blocks
from blocks.attention.base import Attention as Attention
from blocks.attention.scored import Scored as ScoredAttention
from blocks.balance.base import Balance as Balance
from blocks.cache import Cache as Cache
from blocks.dropping.base import Dropping as Dropping
from blocks.experts.base import Experts as Experts
from blocks.ffn.base import FFN as FFN
from blocks.forward_pass import Pass as Pass
from blocks.gating.base import Gating as Gating
from blocks.gating.base import Routing as Routing
from blocks.images.base import Images as Images
from blocks.images.base import Pictures as Pictures
from blocks.mixing.base import Mixing as Mixing
from blocks.norm.base import Norm as Norm
from blocks.output_gate.base import OutputGate as OutputGate
from blocks.position.base import Position as Position
from blocks.projector.base import Projector as Projector
from blocks.qk_norm.base import QKNorm as QKNorm
from blocks.residual.base import Residual as Residual
from blocks.scores.base import Scores as Scores
from blocks.selector.base import Selector as Selector
from blocks.tiling.base import Grid as Grid
from blocks.tiling.base import Tiling as Tiling
from blocks.values.base import Values as Values
from blocks.vision.base import Vision as Vision

# write text
from blocks.generation.generate import generate as generate
from blocks.generation.sample import Sampling as Sampling
from lab.writer import Request as Request
from lab.writer import Writer as Writer

# train
from training.callbacks.finale import Finale as Finale
from training.figure import Figure as Figure
from training.tasks.scored import Scored as Scored
from training.tasks.base import Task as Task
from training.tasks.causal_lm import CausalLM as CausalLM
from training.data.corpus import Corpus as Corpus
from training.data.transform import Transform as Transform
from training.data.tokenizers.base import Tokenizer as Tokenizer
from training.optimizers.base import OptimizerRecipe as OptimizerRecipe
from training.schedulers.base import Schedule as Schedule

# measure
from blocks.cost import cache_bytes as cache_bytes
from blocks.cost import count_parameters as count_parameters
from blocks.cost import forward_flops_per_token as forward_flops_per_token
from lab.describe import figures as describe
from lab.reading.base import Prompt as Prompt
from lab.reading.base import ReadingTest as ReadingTest
from lab.reading.base import compose_prompt as compose_prompt
from lab.reading.base import reading_test as reading_test
