package policycache

// OwnLabels are labels that controllers give to tell one pod or one revision
// from the next. They say nothing of what a pod is.
var OwnLabels = []string{
	"pod-template-hash", "controller-revision-hash",
	"statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index",
	"controller-uid", "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-completion-index",
}
