package manifest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"unicode"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	kjson "sigs.k8s.io/json"

	"portcullis/policycache"
)

// versions are the kinds that are read, each with its only apiVersion.
var versions = map[string]string{
	"List":          "v1",
	"Namespace":     "v1",
	"Pod":           "v1",
	"Node":          "v1",
	"NetworkPolicy": "networking.k8s.io/v1",
}

// maxNesting bounds lists within lists; real ones aren't nested at all.
const maxNesting = 4

// decoder collects one file's objects and everything that is wrong with it.
type decoder struct {
	log  *slog.Logger
	file string
	objs *policycache.Objects
	errs []error
}

// decode reads one file's content. It gives what could be read even when there
// are errors, each of which is one line that says where and what.
func decode(file string, data []byte, log *slog.Logger) (*policycache.Objects, []error) {
	d := &decoder{log: log, file: file, objs: policycache.NewObjects()}
	docs, err := split(data)
	for _, doc := range docs {
		where := fmt.Sprintf("document %d", doc.number)
		if len(doc.flaws) > 0 {
			where = place(where, nameOf(doc.json))
		}
		for _, flaw := range doc.flaws {
			d.fail(where, errors.New(flaw))
		}
		// The flaws are doubled keys: which of the two was meant nobody knows,
		// so the document's content isn't looked at.
		if len(doc.flaws) == 0 {
			d.object(where, doc.json, metav1.TypeMeta{}, 0)
		}
	}
	if err != nil {
		d.errs = append(d.errs, oneLine(err.Error()))
	}
	return d.objs, d.errs
}

func (d *decoder) fail(where string, err error) {
	d.errs = append(d.errs, oneLine(where+": "+err.Error()))
}

// oneLine keeps what a file contains from breaking the line it is reported in.
func oneLine(text string) error {
	return errors.New(strings.Join(strings.FieldsFunc(text, unicode.IsControl), " "))
}

func place(where, what string) string {
	if what == "" {
		return where
	}
	return where + ": " + what
}

// nameOf gives "Kind namespace/name" for a message about an object, as far as
// the object says.
func nameOf(raw []byte) string {
	var o metav1.PartialObjectMetadata
	if err := kjson.UnmarshalCaseSensitivePreserveInts(raw, &o); err != nil {
		return ""
	}
	return describe(o.Kind, &o.ObjectMeta)
}

func describe(kind string, m *metav1.ObjectMeta) string {
	namespace := m.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	switch {
	case m.Name == "" || kind == "":
		return kind
	case kind == "Namespace" || kind == "Node":
		return kind + " " + m.Name
	}
	return kind + " " + namespace + "/" + m.Name
}

// object reads one object, or a list of them. A typed list's items needn't
// repeat what they are; given says it for them.
func (d *decoder) object(where string, raw []byte, given metav1.TypeMeta, depth int) {
	meta := given
	if err := unmarshal(raw, &meta, kjson.DisallowDuplicateFields); err != nil {
		d.fail(where, err)
		return
	}
	if meta.Kind == "" || meta.APIVersion == "" {
		d.fail(where, errors.New("no apiVersion or no kind: not a Kubernetes object"))
		return
	}
	if given.Kind != "" && meta != given {
		d.fail(where, fmt.Errorf("a %s %s in a list of %s %s", meta.APIVersion, meta.Kind, given.APIVersion, given.Kind))
		return
	}
	item := metav1.TypeMeta{APIVersion: meta.APIVersion, Kind: strings.TrimSuffix(meta.Kind, "List")}
	switch reads, err := recognise(meta); {
	case err != nil:
		d.fail(place(where, nameOf(raw)), err)
	case !reads:
		d.log.Debug("passed over: not a kind that policy looks at", "file", d.file, "where", where, "apiVersion", meta.APIVersion, "kind", meta.Kind)
	case meta.Kind == "List":
		d.list(where, raw, metav1.TypeMeta{}, depth)
	case meta.Kind != item.Kind:
		d.list(where, raw, item, depth)
	default:
		d.kind(where, meta.Kind, raw)
	}
}

// recognise tells whether objects of the kind, or typed lists of them, are
// read. What would have been read under its right apiVersion and spelling is an
// error, for a policy must never be passed over by mistake; but other projects'
// APIs may have kinds of the same names.
func recognise(m metav1.TypeMeta) (bool, error) {
	for known, version := range versions {
		list := known + "List"
		if !kubernetesOwn(m.APIVersion) || !strings.EqualFold(m.Kind, known) && !strings.EqualFold(m.Kind, list) {
			continue
		}
		if m.APIVersion != version || m.Kind != known && m.Kind != list {
			return false, fmt.Errorf("%s %s isn't supported, only %s %s is", m.APIVersion, m.Kind, version, known)
		}
		return true, nil
	}
	return false, nil
}

// kubernetesOwn tells whether the API group is one of Kubernetes itself: those
// have no dot ("apps", "extensions", and none in "v1") or end in ".k8s.io".
func kubernetesOwn(apiVersion string) bool {
	group, _, grouped := strings.Cut(apiVersion, "/")
	return !grouped || !strings.Contains(group, ".") || strings.HasSuffix(group, ".k8s.io")
}

func (d *decoder) list(where string, raw []byte, item metav1.TypeMeta, depth int) {
	var list struct {
		metav1.TypeMeta `json:",inline"`
		metav1.ListMeta `json:"metadata"`
		Items           []json.RawMessage `json:"items"`
	}
	if depth == maxNesting {
		d.fail(where, errors.New("lists are nested too deep"))
		return
	}
	// A misspelt "items" must not read as an empty list.
	if err := unmarshal(raw, &list, kjson.DisallowDuplicateFields, kjson.DisallowUnknownFields); err != nil {
		d.fail(place(where, list.Kind), err)
		return
	}
	for i, raw := range list.Items {
		d.object(fmt.Sprintf("%s: items[%d]", where, i), raw, item, depth+1)
	}
}

// kind reads one object of a kind in versions.
func (d *decoder) kind(where, kind string, raw []byte) {
	switch kind {
	case "Namespace":
		var n corev1.Namespace
		if d.read(where, kind, raw, &n, &n.ObjectMeta, kjson.DisallowDuplicateFields) {
			put(d, kind, d.objs.Namespaces, n.Name, policycache.NamespaceFrom(&n))
		}
	case "Node":
		var n corev1.Node
		if d.read(where, kind, raw, &n, &n.ObjectMeta, kjson.DisallowDuplicateFields) {
			put(d, kind, d.objs.Nodes, n.Name, policycache.NodeFrom(&n))
		}
	case "Pod":
		var p corev1.Pod
		if d.read(where, kind, raw, &p, &p.ObjectMeta, kjson.DisallowDuplicateFields) && d.addresses(where, &p) {
			pod := policycache.PodFrom(&p)
			put(d, kind, d.objs.Pods, pod.Key(), pod)
		}
	case "NetworkPolicy":
		var p networkingv1.NetworkPolicy
		if d.read(where, kind, raw, &p, &p.ObjectMeta, kjson.DisallowDuplicateFields, kjson.DisallowUnknownFields) && d.noNulls(where, raw, &p) {
			policycache.DefaultPolicy(&p)
			put(d, kind, d.objs.Policies, p.Namespace+"/"+p.Name, &p)
		}
	}
}

// addresses refuses a pod with an address that can't be read: the pod would
// stand open, for its packets would be nobody's. An empty one is a pod that has
// none yet.
func (d *decoder) addresses(where string, p *corev1.Pod) bool {
	check := func(field, text string) bool {
		a, err := netip.ParseAddr(text)
		if text == "" || err == nil && a.Zone() == "" {
			return true
		}
		d.fail(place(where, describe("Pod", &p.ObjectMeta)), fmt.Errorf("%s: %q is not an IP address", field, text))
		return false
	}
	ok := check("status.podIP", p.Status.PodIP)
	for i, ip := range p.Status.PodIPs {
		ok = check(fmt.Sprintf("status.podIPs[%d].ip", i), ip.IP) && ok
	}
	return ok
}

// put keeps an object. Of two of one name the later one counts, as if they had
// been applied one after the other.
func put[T any](d *decoder, kind string, objects map[string]*T, key string, object *T) {
	if _, twice := objects[key]; twice {
		d.log.Warn("an object appears twice in one file, the later one counts", "file", d.file, "object", kind+" "+key)
	}
	objects[key] = object
}

// read decodes an object into v, whose metadata is m, and checks its name.
func (d *decoder) read(where, kind string, raw []byte, v any, m *metav1.ObjectMeta, strict ...kjson.StrictOption) bool {
	err := unmarshal(raw, v, strict...)
	if err == nil {
		err = checkName(kind, m)
	}
	if err != nil {
		d.fail(place(where, describe(kind, m)), err)
	}
	return err == nil
}

// checkName holds names to what the API server admits, so that
// "namespace/name" is one object's and nobody else's.
func checkName(kind string, m *metav1.ObjectMeta) error {
	valid := validation.IsDNS1123Subdomain
	if kind == "Namespace" {
		valid = validation.IsDNS1123Label
	}
	if m.Name == "" {
		return errors.New("metadata.name is missing")
	}
	if why := valid(m.Name); len(why) > 0 {
		return fmt.Errorf("metadata.name %q is not a valid name: %s", m.Name, why[0])
	}
	if m.Namespace == "" {
		return nil
	}
	if why := validation.IsDNS1123Label(m.Namespace); len(why) > 0 {
		return fmt.Errorf("metadata.namespace %q is not a valid name: %s", m.Namespace, why[0])
	}
	return nil
}

// unmarshal decodes JSON as the API server does (field names are matched by
// case), with what is forbidden on top. The error joins all that was found.
func unmarshal(raw []byte, v any, strict ...kjson.StrictOption) error {
	flaws, err := kjson.UnmarshalStrict(raw, v, strict...)
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return fmt.Errorf("%s: %s where %s is expected", cmp.Or(wrong.Field, "value"), wrong.Value, kindWord(wrong.Type))
	}
	if err != nil {
		return err
	}
	var texts []string
	for _, flaw := range flaws {
		texts = append(texts, flaw.Error())
	}
	if len(texts) > 0 {
		return errors.New(strings.Join(texts, ", "))
	}
	return nil
}

// kindWord says which sort of JSON value a Go type is read from.
func kindWord(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Slice:
		return "a list"
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.String:
		return "a string"
	}
	return "a value of type " + t.String()
}

// noNulls refuses null as an item of a list in a policy. The API's JSON takes
// "ingress: [null]", which is what a forgotten "-" at the end of a rule list
// reads as, for a rule without conditions, and that would allow everything.
func (d *decoder) noNulls(where string, raw []byte, p *networkingv1.NetworkPolicy) bool {
	var o struct{ Spec any }
	if err := json.Unmarshal(raw, &o); err != nil {
		d.fail(place(where, describe("NetworkPolicy", &p.ObjectMeta)), err)
		return false
	}
	if at := nullItem("spec", o.Spec); at != "" {
		d.fail(place(where, describe("NetworkPolicy", &p.ObjectMeta)), fmt.Errorf("%s is empty (null): write {} if it is meant to match everything", at))
		return false
	}
	return true
}

// nullItem gives the path of a list item that is null, or "".
func nullItem(path string, value any) string {
	switch v := value.(type) {
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			if at := nullItem(path+"."+key, v[key]); at != "" {
				return at
			}
		}
	case []any:
		for i, item := range v {
			at := fmt.Sprintf("%s[%d]", path, i)
			if item == nil {
				return at
			}
			if at = nullItem(at, item); at != "" {
				return at
			}
		}
	}
	return ""
}
