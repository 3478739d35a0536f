"""Learning to learn: differentiate through training, or around it.

`unroll` trains for some steps, and what comes out is a function of everything that went in. `implicit` gives the derivatives of
an optimum without looking at the way there. `es_grad` needs no derivatives at all.
"""

from purestep.meta.evolution import es_grad as es_grad
from purestep.meta.evolution import es_grad_and_value as es_grad_and_value
from purestep.meta.implicit import custom_fixed_point as custom_fixed_point
from purestep.meta.implicit import custom_root as custom_root
from purestep.meta.implicit import implicit as implicit
from purestep.meta.linear import ConvergenceWarning as ConvergenceWarning
from purestep.meta.linear import SolveInfo as SolveInfo
from purestep.meta.linear import solve_cg as solve_cg
from purestep.meta.linear import solve_neumann as solve_neumann
from purestep.meta.linear import solve_normal_cg as solve_normal_cg
from purestep.meta.unroll import Recorded as Recorded
from purestep.meta.unroll import Unrolled as Unrolled
from purestep.meta.unroll import unroll as unroll
