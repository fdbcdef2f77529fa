"""Checks code that cannot be run here: its names, imports, attributes and keyword arguments against the real ones."""

import ast
import builtins
import inspect
import types
from typing import Any


class Unknown:
    """A value that this check knows nothing about."""


class Instance:
    """Some object of a known class."""

    def __init__(self, cls: type):
        self.cls = cls


def parameters(target: Any) -> tuple[set[str], bool]:
    """Names of the keywords that a call accepts, and whether any other is taken as well."""
    if isinstance(target, type):
        names: set[str] = set()
        for owner in target.__mro__:
            if "__init__" not in vars(owner):
                continue
            found, more = parameters(owner.__init__)
            names |= found
            if not more:
                return names - {"self"}, False
        return names - {"self"}, True
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return set(), True
    kinds = inspect.Parameter
    named = {
        p.name for p in signature.parameters.values() if p.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    }
    return named, any(p.kind == kinds.VAR_KEYWORD for p in signature.parameters.values())


class Resolver(ast.NodeVisitor):
    """Walks code in order and notes what does not exist."""

    def __init__(self, names: dict[str, Any]):
        self.names = names
        self.problems: list[str] = []

    def value(self, node: ast.AST) -> Any:
        """What an expression is, as far as it can be told without running it."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, getattr(builtins, node.id, Unknown))
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            if owner is Unknown:
                return Unknown
            if isinstance(owner, Instance):
                if not hasattr(owner.cls, node.attr):
                    return Unknown  # may be set by __init__
                return getattr(owner.cls, node.attr)
            if isinstance(owner, types.ModuleType | type):
                if not hasattr(owner, node.attr):
                    self.problems.append(f"{ast.unparse(node)} does not exist")
                    return Unknown
                return getattr(owner, node.attr)
            return Unknown
        if isinstance(node, ast.Call):
            called = self.value(node.func)
            return Instance(called) if isinstance(called, type) and called is not Unknown else Unknown
        return Unknown

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            module = __import__(alias.name)
            self.names[alias.asname or alias.name.split(".")[0]] = module

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = __import__(node.module or "", fromlist=[alias.name for alias in node.names])
        for alias in node.names:
            if not hasattr(module, alias.name):
                self.problems.append(f"{node.module} has no {alias.name}")
            self.names[alias.asname or alias.name] = getattr(module, alias.name, Unknown)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.names[target.id] = self.value(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names[node.name] = Unknown
        arguments = [*node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        inner = Resolver(self.names | {a.arg: Unknown for a in arguments if a is not None})
        for statement in node.body:
            inner.visit(statement)
        self.problems += inner.problems

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names[node.name] = Unknown
        for statement in [*node.bases, *node.body]:
            self.visit(statement)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.names.setdefault(node.id, Unknown)
        elif node.id not in self.names and not hasattr(builtins, node.id):
            self.problems.append(f"the name {node.id} is not defined")

    def comprehension(self, node: Any) -> None:
        for generator in node.generators:
            self.visit(generator)
        for field in ("elt", "key", "value"):
            if hasattr(node, field):
                self.visit(getattr(node, field))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        self.visit(node.target)
        for condition in node.ifs:
            self.visit(condition)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = self.value(node.func)
        if called is Unknown or isinstance(called, Instance):
            return
        accepted, more = parameters(called)
        for keyword in node.keywords:
            if keyword.arg is not None and not more and keyword.arg not in accepted:
                self.problems.append(f"{ast.unparse(node.func)} takes no argument {keyword.arg}")


def problems(code: str, names: dict[str, Any] | None = None) -> list[str]:
    """What in `code` does not exist; `names` is extended by what the code defines."""
    resolver = Resolver(names if names is not None else {})
    resolver.visit(ast.parse(code))
    return resolver.problems
