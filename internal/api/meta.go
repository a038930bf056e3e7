package api

import (
	"net/http"

	"github.com/openlock/openlock/internal/contract"
)

const cacheShortly = "public, max-age=60"

func (s *Server) openapi(c *call) error {
	c.w.Header().Set("Cache-Control", cacheShortly)
	c.raw(http.StatusOK, "application/json", contract.OpenAPI)
	return nil
}

func (s *Server) discovery(c *call) error {
	c.w.Header().Set("Cache-Control", cacheShortly)
	c.raw(http.StatusOK, "application/json", s.builtin.Discovery())
	return nil
}

func (s *Server) jwks(c *call) error {
	c.w.Header().Set("Cache-Control", cacheShortly)
	c.raw(http.StatusOK, "application/json", s.builtin.JWKS())
	return nil
}

// health answers 200 while the server can record, 503 once it cannot.
func (s *Server) health(c *call) error {
	if err := s.db.Err(); err != nil {
		return err
	}
	c.json(http.StatusOK, struct {
		Status  string `json:"status"`
		Version string `json:"version"`
	}{"ok", s.version})
	return nil
}
