from .bank import Bank as Bank
from .chat_session import ChatSession as ChatSession
from .decoding import Completion as Completion
from .engine import Limits as Limits
from .sampling import Sampling as Sampling
from .server import Server as Server
