package audit

import (
	"fmt"
	"math"
	"os"
	"sync/atomic"
	"syscall"

	"gopkg.in/natefinch/lumberjack.v2"
)

// unlimited is a size in MiB that no file reaches.
const unlimited = math.MaxInt32

// FileConfig says which file is written, and how it is rotated.
type FileConfig struct {
	Path string
	// MaxSize is the size in MiB at which the file is renamed, with the time in
	// its name, and a new one begun; zero for never.
	MaxSize int
	// MaxFiles is how many such files are kept beside the one that is written;
	// zero for all.
	MaxFiles int
	// Compress has them compressed with gzip.
	Compress bool
}

// File is a file that the log is appended to, created for its owner only. Write
// and Close belong to one goroutine, Reopen may be called from any.
type File struct {
	path   string
	log    lumberjack.Logger
	reopen atomic.Bool
}

// OpenFile opens the file, creating it if need be. An error is one line.
func OpenFile(cfg FileConfig) (*File, error) {
	size := min(cfg.MaxSize, unlimited)
	if size <= 0 {
		size = unlimited
	}
	f := &File{path: cfg.Path}
	if err := f.Reopen(); err != nil {
		return nil, err
	}
	f.log = lumberjack.Logger{Filename: cfg.Path, MaxSize: size, MaxBackups: cfg.MaxFiles, Compress: cfg.Compress}
	if info, err := os.Stat(cfg.Path); err == nil && !info.Mode().IsRegular() {
		// A pipe or a device must not be renamed.
		f.log = lumberjack.Logger{Filename: cfg.Path, MaxSize: unlimited}
	}
	return f, nil
}

// Reopen has the file opened by its name anew, as is needed after it was renamed
// or removed to make room for a new one, and creates it. If that fails, the old
// one stays in use. It never waits for a write, which may be stuck: the next
// write goes to the new file.
func (s *File) Reopen() error {
	// Without O_NONBLOCK a pipe without a reader would hold up the caller.
	f, err := os.OpenFile(s.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY|syscall.O_NONBLOCK, 0o600)
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return fmt.Errorf("decision log: %w", err)
	}
	s.reopen.Store(true)
	return nil
}

// Write appends to the file.
func (s *File) Write(b []byte) (int, error) {
	if s.reopen.Swap(false) {
		// The old file's last words were written before; that it can't be
		// closed well takes nothing from the new one.
		_ = s.log.Close()
	}
	return s.log.Write(b)
}

// Close closes the file.
func (s *File) Close() error { return s.log.Close() }
