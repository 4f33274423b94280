"""What every Engine, Tool and Dialect owes, as classes of tests: subclass one and give it the fixtures that it names.

    class TestMyTool(ToolContract):
        @pytest.fixture
        def tool(self):
            return MyTool()

tests/test_contracts.py runs them over the engines, tools and dialects of this repository.
"""

import pytest

pytest.register_assert_rewrite("tests.contracts.engine", "tests.contracts.tool", "tests.contracts.dialect")
