# The public names, and where each is defined. blockwright/lazy.py reads this file, type checkers too.

__version__: str

# compose and load models
from blockwright.blocks.checkpoint.source import load as load
from blockwright.blocks.compose import check as check
from blockwright.blocks.compose import compose as compose
from blockwright.blocks.compose import preset as preset
from blockwright.blocks.decoder import Decoder as Decoder

# add blocks
from blockwright.registry import BlockError as BlockError
from blockwright.registry import Composable as Composable
from blockwright.registry import ConfigError as ConfigError
from blockwright.registry import RegistrationError as RegistrationError
from blockwright.registry import SameAs as SameAs
from blockwright.registry import family as family
from blockwright.registry import kinds as kinds
from blockwright.registry import names as names
from blockwright.registry import register as register
from blockwright.blocks.base import Block as Block
from blockwright.blocks.base import Placement as Placement
from blockwright.blocks.conformance import cases as conformance_cases

# add implementations of kernels, and make of linear layers
from blockwright.blocks.kernels.choice import Kernels as Kernels
from blockwright.blocks.kernels.scoring import Band as Band
from blockwright.blocks.kernels.scoring import Formula as Formula
from blockwright.blocks.kernels.scoring import Scoring as Scoring
from blockwright.blocks.kernels.scoring import Slopes as Slopes
from blockwright.blocks.kernels.seam import kernel as kernel
from blockwright.blocks.linear import linears as linears
from blockwright.blocks.conformance.kernel_parity import kernel_cases as kernel_cases

# the contract of each kind, and what passes between blocks
from blockwright.blocks.attention.base import Attention as Attention
from blockwright.blocks.attention.scored import Changes as Changes
from blockwright.blocks.attention.scored import Scored as ScoredAttention
from blockwright.blocks.balance import Balance as Balance
from blockwright.blocks.cache.base import Cache as Cache
from blockwright.blocks.cache.fixed import State as State
from blockwright.blocks.convolution import Convolution as Convolution
from blockwright.blocks.convolution import convolved as convolved
from blockwright.blocks.dropping import Dropping as Dropping
from blockwright.blocks.entry import Entry as Entry
from blockwright.blocks.exit import Exit as Exit
from blockwright.blocks.experts import Experts as Experts
from blockwright.blocks.ffn import FFN as FFN
from blockwright.blocks.forward_pass import Pass as Pass
from blockwright.blocks.gating.base import Gating as Gating
from blockwright.blocks.gating.base import Routing as Routing
from blockwright.blocks.input import Input as Input
from blockwright.blocks.kv_source import KVSource as KVSource
from blockwright.blocks.loop import Loop as Loop
from blockwright.blocks.memory import Memory as Memory
from blockwright.blocks.memory import Table as Table
from blockwright.blocks.mixing import Mixing as Mixing
from blockwright.blocks.norm import Norm as Norm
from blockwright.blocks.output_gate import OutputGate as OutputGate
from blockwright.blocks.position.base import Position as Position
from blockwright.blocks.qk_norm import QKNorm as QKNorm
from blockwright.blocks.readout import Readout as Readout
from blockwright.blocks.base import Keys as Keys
from blockwright.blocks.base import Queries as Queries
from blockwright.blocks.residual.base import Residual as Residual
from blockwright.blocks.scores import Scores as Scores
from blockwright.blocks.selector.base import Selector as Selector
from blockwright.blocks.values import Values as Values
from blockwright.blocks.visit_draw import VisitDraw as VisitDraw

# write text
from blockwright.blocks.generation.generate import generate as generate
from blockwright.blocks.generation.sample import Sampling as Sampling
from blockwright.lab.attachment import Attachment as Attachment
from blockwright.lab.writer import Request as Request
from blockwright.lab.writer import Writer as Writer

# train
from blockwright.training.callbacks.step_end import Finale as Finale
from blockwright.training.figure import Figure as Figure
from blockwright.training.tasks.means import Scored as Scored
from blockwright.training.tasks.base import Task as Task
from blockwright.training.tasks.making import Setup as Setup
from blockwright.training.starts import Start as Start
from blockwright.training.tasks.causal_lm import CausalLM as CausalLM
from blockwright.training.data.modules.batches import DataModule as DataModule
from blockwright.training.data.corpus import Corpus as Corpus
from blockwright.training.data.windows import Transform as Transform
from blockwright.training.data.tokenizers.tokenizer import Tokenizer as Tokenizer
from blockwright.training.optimizers.recipe import Constraint as Constraint
from blockwright.training.optimizers.recipe import OptimizerRecipe as OptimizerRecipe
from blockwright.training.schedulers import Schedule as Schedule

# measure
from blockwright.blocks.cost import cache_bytes as cache_bytes
from blockwright.blocks.cost import count_parameters as count_parameters
from blockwright.blocks.cost import forward_flops_per_token as forward_flops_per_token
from blockwright.lab.describe import figures as describe
