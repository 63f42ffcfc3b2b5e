"""One letter, one meaning, in every signature. Time comes before heads.

    B  examples in a batch        H  query heads            C     channels of an image
    T  positions that ask         G  key and value heads    Y, X  rows and columns of an image
    S  positions that are seen    K  width of one head      N     objects, queries, samples of a set
    D  width of the stream        F  hidden width           V     entries of the vocabulary, classes

Annotations are for the reader, and are checked in the tests only.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "B T"]
Stream = Float[Tensor, "B T D"]
Memory = Float[Tensor, "B S D"]
Logits = Float[Tensor, "B T V"]
Queries = Float[Tensor, "B T H K"]
Keys = Float[Tensor, "B S G K"]
Values = Float[Tensor, "B S G K"]
Heads = Float[Tensor, "B T H K"]
Scores = Float[Tensor, "B H T S"]
Mask = Bool[Tensor, "#B #H T S"]
Images = Float[Tensor, "B C Y X"]
Positions = Int[Tensor, "*B T"]
PerExample = Float[Tensor, " B"]
