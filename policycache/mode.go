package policycache

import (
	"fmt"

	"portcullis/verdict"
)

// annotated names an annotation of an object.
type annotated struct{ kind, name, annotation string }

// SetMode says what becomes of denials where neither a pod's namespace nor its
// node has the annotation portcullis.dev/mode; without it they are carried out.
// It must come before the first Compile.
func (c *Compiler) SetMode(m verdict.Mode) { c.mode = m }

// nodeMode gives the mode of a node's pods, unless their namespaces have another.
// Of a node that isn't known it is the default.
func (c *Compiler) nodeMode(name string) verdict.Mode {
	var own verdict.Mode
	if n := c.nodes[name]; n != nil {
		own, _ = verdict.ParseMode(n.Mode)
	}
	return own.Or(c.mode)
}

// auditOnly tells whether denials by a pod's policies are only logged: what its
// namespace says goes before what its node says, and that before the default.
func (w *compilation) auditOnly(p *pod) bool {
	return p.subject.namespace.mode.Or(w.nodeMode(p.Node)) == verdict.ModeAuditOnly
}

// changeNodeMode has the endpoints of a node's pods made anew if the node's mode
// is another one. Modes change seldom, so it looks at all pods.
func (w *compilation) changeNodeMode(name string, before, now *Node) {
	was, is := "", ""
	if before != nil {
		was = before.Mode
	}
	if now != nil {
		is = now.Mode
	}
	if was == is {
		return
	}
	w.readMode("node", name, is)
	for _, p := range w.pods {
		if p.Pod != nil && p.Node == name {
			w.stale(p)
		}
	}
}

func (w *compilation) readMode(kind, name, text string) verdict.Mode {
	return readWord(w, annotated{kind, name, ModeAnnotation}, text, verdict.ParseMode, "enforce or audit-only")
}

// readWord reads an annotation. One that can't be understood is as none, and is
// told among the problems.
func readWord[W any](w *compilation, a annotated, text string, parse func(string) (W, bool), want string) W {
	word, ok := parse(text)
	before := w.badWords[a]
	switch {
	case ok && before == nil:
		return word
	case ok:
		delete(w.badWords, a)
	default:
		w.badWords[a] = fmt.Errorf("annotation %s: %q is not %s", a.annotation, text, want)
	}
	w.problemsChanged = true
	return word
}
