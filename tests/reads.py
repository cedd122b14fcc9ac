"""Find which attributes of which classes the sources read, by the types that annotations give to names.

A name such as `name` or `path` says nothing alone: `optim.name` is a field of the config, `tensor.name` is not. Type
checkers know the difference, but take half a minute. This takes a second, since it understands only what our sources
do: annotated parameters, fields and results, what is assigned from them, and loops over lists of them. A list counts as
its elements. What is not understood is not counted.
"""

import ast


class Reads(ast.NodeVisitor):
    def __init__(self, trees: list[ast.Module]) -> None:
        nodes = [node for tree in trees for node in ast.walk(tree)]
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        self.bases = {c.name: [base.id for base in c.bases if isinstance(base, ast.Name)] for c in classes}
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and self.named(node.returns)]
        self.results = {function.name: self.named(function.returns) for function in functions}
        self.members: dict[str, dict[str, str]] = {name: {} for name in self.bases}
        self.found: set[tuple[str, str]] = set()
        """Class and attribute."""
        self._class = ""
        self._scope: dict[str, str] = {}
        for tree in [*trees, *trees]:  # twice, since a class may be used above the place where it is defined
            self._scope = {}
            self.visit(tree)

    def named(self, annotation: ast.expr | None) -> str:
        """Return the first class that an annotation names, or nothing."""
        for node in ast.walk(annotation) if annotation else ():
            name = node.id if isinstance(node, ast.Name) else node.value if isinstance(node, ast.Constant) else None
            if isinstance(name, str) and name in self.bases:
                return name
        return ""

    def lineage(self, name: str) -> list[str]:
        """Return a class and all that it inherits from, nearest first."""
        return [name, *(ancestor for base in self.bases.get(name, []) for ancestor in self.lineage(base))]

    def class_of(self, node: ast.expr) -> str:
        """Return the class of an expression, or nothing."""
        match node:
            case ast.Name(id=name):
                return self._scope.get(name, "")
            case ast.Attribute(value=value, attr=name):
                members = [self.members.get(owner, {}) for owner in self.lineage(self.class_of(value))]
                return next((m[name] for m in members if name in m), "")
            case ast.Call(func=ast.Name(id=name)):
                return name if name in self.bases else self.results.get(name, "")
            case ast.Call(func=value) | ast.IfExp(body=value) | ast.NamedExpr(value=value) | ast.Subscript(value=value):
                return self.class_of(value)
        return ""

    def bind(self, target: ast.expr, name: str) -> None:
        if isinstance(target, ast.Name):
            self._scope[target.id] = name
        elif name and isinstance(target, ast.Attribute) and (owner := self.class_of(target.value)):
            self.members[owner][target.attr] = name

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer = self._class, self._scope
        self._class, self._scope = node.name, {}
        self.generic_visit(node)
        self._class, self._scope = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self._class:
            self.members[self._class][node.name] = self.named(node.returns)
        arguments = {a.arg: self.named(a.annotation) for a in [*node.args.args, *node.args.kwonlyargs]}
        outer, self._scope = self._scope, self._scope | arguments | {"self": self._class}
        self.generic_visit(node)
        self._scope = outer

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self.bind(node.target, self.named(node.annotation))
        if self._class and isinstance(node.target, ast.Name):
            self.members[self._class][node.target.id] = self.named(node.annotation)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for each, value in zip(target.elts, node.value.elts):
                    self.bind(each, self.class_of(value))
            else:
                self.bind(target, self.class_of(node.value))

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        self.bind(node.target, self.class_of(node.iter))
        self.generic_visit(node)

    visit_comprehension = visit_For

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        for generator in node.generators:  # they bind the names that the element uses
            self.visit(generator)
        self.generic_visit(node)

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if owner := self.class_of(node.value):
            self.found.add((owner, node.attr))
        self.generic_visit(node)
