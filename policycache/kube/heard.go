package kube

import (
	"io"
	"net/http"
	"path"
	"sync"
	"time"
)

// heard notes when the API server last said anything about a resource: an
// answer, an event of a watch, or a bookmark, which comes every minute or so
// even when nothing happens. So it tells how old the state may be.
//
// It also listens for requests that get no answer at all: the informers try
// those again by themselves and tell nobody.
type heard struct {
	mu     sync.Mutex
	last   map[string]time.Time
	silent func(resource string, err error) // nil: nobody asks
}

func newHeard() *heard { return &heard{last: map[string]time.Time{}} }

func (h *heard) note(resource string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last[resource] = time.Now()
}

// at gives the last time for a resource, the zero time if there was none.
func (h *heard) at(resource string) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last[resource]
}

// wrap makes a transport that listens along.
func (h *heard) wrap(next http.RoundTripper) http.RoundTripper {
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		if r.Method != http.MethodGet {
			return next.RoundTrip(r) // an event being written
		}
		// The last element of a list's or watch's path is the resource.
		resource := path.Base(r.URL.Path)
		response, err := next.RoundTrip(r)
		if err != nil && h.silent != nil && r.Context().Err() == nil {
			h.silent(resource, err)
		}
		if err == nil && response.StatusCode == http.StatusOK {
			h.note(resource)
			response.Body = &listener{ReadCloser: response.Body, heard: h, resource: resource}
		}
		return response, err
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// listener notes each piece of an answer that arrives.
type listener struct {
	io.ReadCloser
	heard    *heard
	resource string
}

func (l *listener) Read(b []byte) (int, error) {
	n, err := l.ReadCloser.Read(b)
	if n > 0 {
		l.heard.note(l.resource)
	}
	return n, err
}
