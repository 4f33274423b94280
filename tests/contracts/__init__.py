"""What every Engine, Tool, Dialect and reward owes, as classes of tests: subclass one and give it the fixtures that it
names.

    class TestMyTool(ToolContract):
        @pytest.fixture
        def tool(self):
            return MyTool()

tests/test_contracts.py runs them over the engines, tools, dialects and rewards of this repository.
"""

import pytest

pytest.register_assert_rewrite(
    "tests.contracts.engine", "tests.contracts.tool", "tests.contracts.dialect", "tests.contracts.reward"
)
