"""svd: the best approximation of the weighted sum by a given rank (Eckart and Young, 1936), or by the
smallest rank that holds a share of its energy.

    sum_i w_i B_i A_i = U S V'  ->  (U_r S_r^1/2) (S_r^1/2 V_r')

Exact in factor space (see `compose.factors`), its error known without the update: sum of the squared values
left out. The values are split evenly between the two sides, which half precision survives better than all on
one.
"""

from compose.methods.method import Method
from compose.methods.naive import naive

METHOD = Method(
    naive,
    "the best low-rank approximation of the weighted sum (Eckart-Young)",
    frozenset({"rank", "energy", "ratio"}),
)
