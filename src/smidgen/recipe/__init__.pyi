from .recipe import Recipe as Recipe
from .recipe import Term as Term
from .recipe import parse as parse
