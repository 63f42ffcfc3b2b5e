"""One letter, one meaning, in every signature. Time comes before heads.

    B  examples in a batch        H  query heads            C     channels of an image
    T  positions that ask         G  key and value heads    Y, X  rows and columns of an image
    S  positions that are seen    K  width of one head      N     objects, queries, samples of a set
    D  width of the stream        F  hidden width           V     entries of the vocabulary, classes
    W  width of a head's values, K where nothing else is said

Annotations are for the reader, and are checked in the tests only. `_` is a size without a
letter: the maps that a convolution makes of images have channels, rows and columns of their own, and a stream may leave
a part longer, shorter, wider or narrower than it came.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "B T"]
Source = Int[Tensor, "B S"]
Stream = Float[Tensor, "B T D"]
OtherStream = Float[Tensor, "B _ _"]
Memory = Float[Tensor, "B S D"]
Features = Float[Tensor, "*B D"]
Logits = Float[Tensor, "B T V"]
Queries = Float[Tensor, "B T H K"]
Keys = Float[Tensor, "B S G K"]
Values = Float[Tensor, "B S G W"]
Heads = Float[Tensor, "B T H W"]
Scores = Float[Tensor, "B H T S"]
Mask = Bool[Tensor, "#B #H T S"]
Images = Float[Tensor, "B C Y X"]
Maps = Float[Tensor, "B _ _ _"]
Positions = Int[Tensor, "*B T"]
PerExample = Float[Tensor, " B"]
