package main

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
	"strings"

	"portcullis/filter"
	"portcullis/policycache/explain"
	"portcullis/policycache/live"
	"portcullis/verdict"
)

// maxQuestions bounds a batch of questions, in bytes.
const maxQuestions = 64 << 20

// The headers of answers about policy: whose they are, and of which generation; and how
// many lines of a batch couldn't be answered, or pods were left out of a matrix.
const (
	nodeHeader       = "Portcullis-Node"
	generationHeader = "Portcullis-Generation"
	badHeader        = "Portcullis-Bad"
	leftOutHeader    = "Portcullis-Left-Out"
)

// cluster gives the policy in force as explain asks it.
func (a *agent) cluster(w http.ResponseWriter, r *http.Request) (*explain.Cluster, bool) {
	objects, snapshot := a.inspect.current()
	if snapshot == nil {
		http.Error(w, errNoState.Error(), http.StatusServiceUnavailable)
		return nil, false
	}
	w.Header().Set(nodeHeader, a.options.node)
	w.Header().Set(generationHeader, strconv.FormatUint(snapshot.Generation(), 10))
	return explain.New(objects, snapshot, r.URL.Query().Get("namespace")).OfNode(), true
}

// answer writes a page, or what is wrong with the question.
func answer(w http.ResponseWriter, page *bytes.Buffer, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	w.Write(page.Bytes()) // whoever asked may have gone
}

func (a *agent) answerExplain(w http.ResponseWriter, r *http.Request) {
	c, ok := a.cluster(w, r)
	if !ok {
		return
	}
	q := r.URL.Query()
	var page bytes.Buffer
	err := writeAnswer(&page, c, explain.Query{From: q.Get("from"), To: q.Get("to"), Port: q.Get("port"), Protocol: q.Get("protocol")}, q.Get("output"))
	answer(w, &page, err)
}

func (a *agent) answerBatch(w http.ResponseWriter, r *http.Request) {
	c, ok := a.cluster(w, r)
	if !ok {
		return
	}
	questions, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxQuestions))
	var page bytes.Buffer
	if err == nil {
		var bad int
		bad, err = c.Batch(bytes.NewReader(questions), &page)
		w.Header().Set(badHeader, strconv.Itoa(bad))
	}
	answer(w, &page, err)
}

func (a *agent) answerMatrix(w http.ResponseWriter, r *http.Request) {
	c, ok := a.cluster(w, r)
	if !ok {
		return
	}
	q := r.URL.Query()
	var page, leftOut bytes.Buffer
	m, err := c.Matrix(q.Get("protocol"), q.Get("port"), q.Get("only"))
	if err == nil {
		noteLeftOut(&leftOut, m.LeftOut())
		w.Header().Set(leftOutHeader, strings.TrimSpace(leftOut.String()))
		err = writeMatrix(&page, m, q.Get("output"))
	}
	answer(w, &page, err)
}

// fillSample takes in what the queues count.
func fillSample(s *live.Sample, queues []filter.QueueStats) {
	bounds := filter.LatencyBounds()
	s.Latency = make([]live.Bucket, len(bounds)+1)
	for i, b := range bounds {
		s.Latency[i].UpToNs = b.Nanoseconds()
	}
	for i := range queues {
		q := &queues[i]
		s.Queues = append(s.Queues, live.Queue{Number: q.Queue, Waiting: q.Waiting, Dropped: q.KernelDropped + q.UserDropped})
		for _, byVerdict := range q.Decisions {
			for v, n := range byVerdict {
				s.Decisions[verdict.Verdict(v).String()] += n
			}
		}
		for i, n := range q.Latency {
			s.Latency[i].Count += n
		}
	}
}
